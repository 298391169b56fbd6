"""The gates as V3, Kimi K2, V2 and V2-Lite launch them, whatever the number of tokens."""

from kernels.ops.gate_kernel import gate_greedy_kernel, gate_noaux_tc_kernel
from tests.kernels.ops.shipping import Shipped, meta

SHIPPED = {
    "V3": Shipped(lambda: gate_noaux_tc_kernel(meta(128, 256), meta(256), 8, 8, 4, True, 2.5)),
    "Kimi K2": Shipped(lambda: gate_noaux_tc_kernel(meta(128, 384), meta(384), 8, 1, 1, True, 2.827)),
    "V2": Shipped(lambda: gate_greedy_kernel(meta(128, 160), 6, 8, 3, 16.0)),
    "V2-Lite": Shipped(lambda: gate_greedy_kernel(meta(128, 64), 6, 1, 1, 1.0)),
}
