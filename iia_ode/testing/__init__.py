"""The conformance suite that every registered solver passes, for solvers of one's own.

:func:`verify` prints a certificate, :func:`check` raises with everything that is wrong, and ``CHECKS`` are the parts, one test
case each. Nothing here needs pytest.
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
