"""The dashboard: one page that shows what the nodes of a swarm tell of themselves.

``panorama`` makes one picture of what several nodes tell (pure), ``observer`` asks them over gRPC,
``web`` serves the picture to browsers, ``page`` is what a browser loads.
"""
