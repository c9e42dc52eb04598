"""The service as Serve's gRPC proxy registers it: bodies go to the replica as they came, and are decoded there.

So a body that is too large is refused before it is decoded, and the proxy, which is the busiest process, spends nothing on it.
What the proxy accepts at all is bounded by RAY_SERVE_GRPC_MAX_MESSAGE_SIZE (2 GiB by default) in its environment.
"""

from typing import Any

import grpc

SERVICE = "longer.scoring.v1.Scoring"


def add_scoring(servicer: Any, server: grpc.Server) -> None:
    """For `grpc_servicer_functions` of a Serve config."""
    calls = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name))
        for name in ("Score", "ScoreBatch", "AddEvents", "ForgetUser", "Model")
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
