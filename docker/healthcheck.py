"""Exit code 0 when the node in this container serves, by its gRPC health service."""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

# An engine that is set up for a proxy gives its address to all containers; not for this call.
DIRECT = [("grpc.enable_http_proxy", 0)]

port = os.environ["DECA_NODE__HEALTH_PORT"]
with grpc.insecure_channel(f"127.0.0.1:{port}", DIRECT) as channel:
    try:
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=25
        )
    except grpc.RpcError as error:
        sys.exit(f"no answer: {error.code().name}")
if reply.status != health_pb2.HealthCheckResponse.SERVING:
    sys.exit(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
