"""Convergence of the reference of `iia-ode compare`: its change, in RMSE per pixel, as the tolerance shrinks.

The digits network computes in float32, with a floor in accuracy. The errors reported by the comparison must stay far above it.
"""

import torch

from iia_ode.experiments import get_setting
from iia_ode.metrics import rmse
from iia_ode.reference import solve


def main() -> None:
    setting = get_setting("digits")
    ode, x = setting.draw(32, 1)
    before = None
    print(f"{'tolerance':>10} {'evaluations':>12} {'change (RMSE)':>14}")
    with torch.no_grad():
        for tolerance in (1e-4, 1e-5, 1e-6, 1e-7):
            ode.ledger.reset()
            final = solve(ode, x, setting.sigma_max, 0.0, rtol=tolerance, atol=tolerance, sigma_min=setting.sigma_min)
            change = "-" if before is None else f"{rmse(final, before):.2e}"
            print(f"{tolerance:>10.0e} {ode.nfe:>12} {change:>14}")
            before = final


if __name__ == "__main__":
    main()
