"""The conformance suite of solvers, for registered solvers and for your own.

:func:`verify` prints a certificate, :func:`check` raises one error that lists every broken promise, and ``CHECKS`` holds the
checks, each a test case. The suite does not need pytest.
"""

from .certificate import Certificate, verify
from .conformance import CHECKS, Check, CheckResult, check, run_checks
from .orders import OrderMeasurement, measure_order, measure_orders, order_misses
from .stability import stability_limit

__all__ = [
    "CHECKS",
    "Certificate",
    "Check",
    "CheckResult",
    "OrderMeasurement",
    "check",
    "measure_order",
    "measure_orders",
    "order_misses",
    "run_checks",
    "stability_limit",
    "verify",
]
