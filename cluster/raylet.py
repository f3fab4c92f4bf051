"""The only file that asks a raylet: to start worker processes before anybody needs them.

It stands on a call of Ray's own services, no public API, and on nothing but time depending on it: hence one file, and
Ray pinned below 2.61.
"""

from cluster.gcs import Unanswered

TIMEOUT_S = 2.0


def start_idle(address: str, job_id: str, environment: str, workers: int, keep_s: int) -> None:
    """Have the raylet at host:port start up to 10 idle workers of a job for whatever task or actor comes first.

    job_id: hex. environment: serialized runtime environment that those will ask for. keep_s: seconds before Ray may end
    one that nobody took. Returns before they have started. Raises Unanswered.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import PYTHON  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    request = PrestartWorkersRequest(
        language=PYTHON, job_id=bytes.fromhex(job_id), num_workers=workers, keep_alive_duration_secs=keep_s
    )
    request.runtime_env_info.serialized_runtime_env = environment
    channel = init_grpc_channel(address)
    try:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        raise Unanswered(f"raylet at {address}: {error}") from error
    finally:
        channel.close()
