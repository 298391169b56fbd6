"""What Kubernetes runs before it ends a pod: its actors move to other pods, or finish, and then it ends.

`python leave.py FINISH_S REPLACEMENT_S`. Serve ends actors on a draining node once their replacements run, or
FINISH_S before the deadline where none could be started; a raylet without actors that drains ends by itself.
"""

import os
import sys
import time

from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2, gcs_pb2

POLL_S = 2.0
HEAD_PAUSE_S = 10.0  # in which the other pods, if they too must go, have said so
ANSWER_S = 5.0


def own_node(nodes, pod_name):
    """Id and record of the living node that runs in this pod, or None."""
    alive = gcs_pb2.GcsNodeInfo.ALIVE
    mine = (
        (node_id, node)
        for node_id, node in nodes.items()
        if node.instance_id == pod_name and node.state == alive
    )
    return next(mine, None)


def leave(client, pod_name, finish_s, replacement_s, clock=time.time, sleep=time.sleep):
    """Drain this pod's node; returns once it is gone, or when the time is up."""
    end_s = clock() + finish_s + replacement_s
    found = own_node(client.get_all_node_info(timeout=ANSWER_S), pod_name)
    if found is None:
        return
    node_id, node = found
    if node.is_head_node:
        sleep(HEAD_PAUSE_S)
        while client.get_draining_nodes(timeout=ANSWER_S) and clock() < end_s:
            sleep(POLL_S)
        return
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client.drain_node(node_id.hex(), reason, "its pod is to end", int(end_s * 1000), timeout=ANSWER_S)
    while clock() < end_s and own_node(client.get_all_node_info(timeout=ANSWER_S), pod_name):
        sleep(POLL_S)


if __name__ == "__main__":
    gcs = GcsClient(address=os.environ["RAY_ADDRESS"])
    leave(gcs, os.environ["RAY_CLOUD_INSTANCE_ID"], float(sys.argv[1]), float(sys.argv[2]))
