"""The conformance suite of solvers, for registered solvers and for your own.

:func:`verify` prints a certificate. :func:`check` raises one error that lists every broken promise. ``CHECKS`` holds the
checks; each check is a test case. The suite does not need pytest.
"""

from .certificate import Certificate, verify
from .conformance import CHECKS, Check, CheckResult, check, run_checks
from .local import local_errors
from .orders import OrderMeasurement, measure_order, measure_orders, order_misses
from .plans import PlanCertificate, plan_certificate
from .stability import stability_limit, stability_region

__all__ = [
    "CHECKS",
    "Certificate",
    "Check",
    "CheckResult",
    "OrderMeasurement",
    "PlanCertificate",
    "check",
    "local_errors",
    "measure_order",
    "measure_orders",
    "order_misses",
    "plan_certificate",
    "run_checks",
    "stability_limit",
    "stability_region",
    "verify",
]
