"""The dashboard: one page that shows what the nodes of a swarm tell of themselves.

``web`` serves the picture (``deca_node.panorama``) to browsers, ``page`` is what a browser loads.
"""
