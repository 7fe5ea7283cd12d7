"""Plots: of a comparison and its images, and figures of a fit."""

import sys
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

import iia_ode as iia
from iia_ode import plots
from iia_ode.experiments import Comparison, Row, StepError, StepErrors, compare, get_setting


@pytest.fixture(scope="module")
def stepwise():
    ode, x = get_setting("mixture").draw(40, 0)
    return iia.IIA("ddim", "window", "trajectory").fit(ode, x, iia.grids.karras(5))


@pytest.fixture(scope="module")
def found():
    """The result of a search with fits in closed form and a refinement."""
    ode, x = get_setting("mixture").draw(16, 0)
    budget = iia.Budget(teacher_steps=20, trials=2, starts=1, iterations=2)
    return iia.fit(ode, 4, x=x, budget=budget, sigma_max=80.0)


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_coefficients_have_a_line_each_and_steps_that_keep_the_base_are_shaded(stepwise):
    (axes,) = plots.plot_coefficients(stepwise).axes
    lines = lines_of(axes)
    assert set(lines) == {symbol for report in stepwise.reports for symbol in report.symbols}
    for report in stepwise.reports:
        for symbol, correction in zip(report.symbols, report.corrections, strict=True):
            line = lines[symbol]
            assert correction in [
                y for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if x == report.index
            ]
    assert len(axes.patches) == sum(not report.accepted for report in stepwise.reports)


def test_without_steps_of_its_own_a_fits_weights_are_those_of_its_states_on_data_estimates(found):
    fit = iia.FittedSolver(found.plan, (), found.record)
    (axes,) = plots.plot_coefficients(fit).axes
    lines, form = lines_of(axes), fit.plan.canonical()
    assert set(lines) == {"D[i]", "D[i-1]", "D[i-2]", "D[i-3]"}
    assert lines["D[i]"].get_ydata()[-1] == form.final.weights[4]
    assert lines["D[i-3]"].get_ydata()[-1] == form.final.weights[1]
    with pytest.raises(iia.errors.InputError, match="not fitted step by step"):
        plots.plot_residuals(fit)


def test_residuals_are_drawn_for_both_halves_of_the_batch(stepwise):
    (axes,) = plots.plot_residuals(stepwise).axes
    lines = lines_of(axes)
    assert set(lines) == {"base", "fitted", "base, held out", "fitted, held out"}
    assert list(lines["fitted"].get_ydata()) == [r.after for r in stepwise.reports]
    assert list(lines["base, held out"].get_ydata()) == [r.held_before for r in stepwise.reports]
    assert axes.get_yscale() == "log"


def test_residuals_of_a_fit_to_the_whole_batch_have_no_held_out_half():
    ode, x = get_setting("mixture").draw(8, 0)
    fit = iia.preset("iia-ddim").fit(ode, x, iia.grids.karras(4))
    assert set(lines_of(plots.plot_residuals(fit).axes[0])) == {"base", "fitted"}


def test_ingredients_have_a_bar_each_and_the_chosen_one_is_in_color(found):
    ingredients = found.record.search.ingredients
    (axes,) = plots.plot_ingredients(found).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [i.name for i in ingredients]
    assert [bar.get_width() for bar in axes.patches] == [i.error for i in ingredients]
    colors = [mpl.colors.to_hex(bar.get_facecolor()) for bar in axes.patches]
    (chosen,) = (k for k, i in enumerate(ingredients) if i.chosen)
    assert colors.count(colors[chosen]) == 1


def test_an_ingredient_that_could_not_be_made_is_named_without_a_bar(found):
    first, *others = found.record.search.ingredients
    entries = (replace(first, error=None), *others)
    record = replace(found.record, search=replace(found.record.search, ingredients=entries))
    changed = iia.FittedSolver(found.plan, found.reports, record)
    (axes,) = plots.plot_ingredients(changed).axes
    assert len(axes.patches) == len(entries) - 1
    assert axes.texts[0].get_text() == "not possible"


def test_only_what_one_call_found_has_ingredients(stepwise):
    with pytest.raises(iia.errors.InputError, match=r"not made by iia_ode\.fit"):
        plots.plot_ingredients(stepwise)


def test_no_text_of_a_figure_overlaps_another(stepwise, found):
    grid = iia.grids.karras(25)
    ode, x = get_setting("mixture").draw(12, 0)
    long = iia.IIA("heun", terms="window", history=2, guard=False, substeps=2).fit(ode, x, grid)
    figures = [plots.plot_coefficients(f) for f in (stepwise, long, found)]
    figures += [plots.plot_residuals(f) for f in (stepwise, long)]
    figures.append(plots.plot_ingredients(found))
    for figure in figures:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [t.get_window_extent() for t in labels if t.get_text()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_plots_of_a_fit_need_no_default_device(stepwise):
    torch.set_default_device("meta")
    try:
        plots.plot_coefficients(stepwise)
    finally:
        torch.set_default_device(None)


# ---- comparisons and images -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison():
    return compare(get_setting("mixture"), ["ddim", "heun"], [3, 5], iia.grids.karras, samples=32, fit_samples=1)


def test_plots_draw_on_the_axes_they_are_given(comparison, tmp_path):
    ax = Figure().add_subplot()
    assert plots.error_against_nfe(comparison, ax) is ax
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(comparison.solvers)
    grid = plots.image_grid(torch.rand(32, 1, 8, 8), columns=8)
    assert grid.images[0].get_array().shape == (4 * 9 - 1, 8 * 9 - 1)
    assert plots.save_figure(ax, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def measured(count, fitted=()):
    """A comparison of `count` lines made by hand, with the lines `fitted` among them fitted."""
    rows = [Row(f"line {k}", n, (k + 1) / n, 0.01, fitted=k in fitted) for k in range(count) for n in (4, 8)]
    return Comparison(rows)


def styles(axes):
    return [(c[0].get_color(), c[0].get_marker(), c[0].get_linestyle()) for c in axes.containers]


@pytest.mark.parametrize("count", [2, 7, 24, 70])
def test_no_two_lines_look_alike_and_fitted_ones_alone_are_solid(count):
    lines = styles(plots.error_against_nfe(measured(count, fitted=range(0, count, 3))))
    assert len({line[:2] for line in lines}) == count
    assert [line[2] == "-" for line in lines] == [k % 3 == 0 for k in range(count)]
    first = lines[:7]
    assert len({c for c, _, _ in first}) == len({m for _, m, _ in first}) == len(first)


def test_lines_with_a_style_of_their_own_differ_from_the_others():
    names = ["ddim", "iia-ddim", "heun", "iia-edm", "biia-edm", "iia", "lms", "dpmpp_2m", "unipc"]
    rows = [Row(name, n, 1 / n, 0.01, fitted="iia" in name) for name in names for n in (4, 8)]
    lines = styles(plots.error_against_nfe(Comparison(rows)))
    assert len(set(lines)) == len({(c, d) for c, _, d in lines}) == len(names)
    assert [line[2] == "-" for line in lines] == ["iia" in name for name in names]


def test_the_legend_says_which_lines_are_solid_where_a_plot_has_both_kinds():
    assert plots.error_against_nfe(measured(3, fitted=[1])).get_legend().get_title().get_text() == "solid: fitted"
    assert plots.error_against_nfe(measured(3)).get_legend().get_title().get_text() == ""


def test_errors_against_seconds_are_those_of_the_rows_and_rows_without_seconds_are_left_out(comparison):
    ax = plots.error_against_seconds(comparison, Figure().add_subplot())
    for container, solver in zip(ax.containers, comparison.solvers, strict=True):
        points = [(r.seconds, r.rmse) for r in sorted(comparison.rows, key=lambda r: r.nfe) if r.solver == solver]
        assert list(zip(*container[0].get_data(), strict=True)) == points
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and "seconds, cpu" in ax.get_xlabel()
    rows = [Row("a", 4, 0.1, 0.01, seconds=0.2), Row("b", 4, 0.1, 0.01)]
    assert len(plots.error_against_seconds(Comparison(rows)).containers) == 1
    with pytest.raises(iia.errors.InputError, match="no row of the comparison has seconds"):
        plots.error_against_seconds(measured(2))


def test_errors_of_steps_go_from_noise_to_data_with_a_line_for_each_solver_and_count():
    def steps(name, nfe, fitted=False):
        levels = [float("inf"), 4.0, 1.0]
        return [StepError(name, nfe, k, 0.5, 0.4, v, 0.1 / (k + 1), 0.01, fitted) for k, v in enumerate(levels)]

    several = StepErrors((*steps("a", 3), *steps("a", 6), *steps("b", 3, fitted=True)), 1e-6)
    ax = plots.error_of_steps(several)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [f"{k} evaluations" for k in ("a, 3", "a, 6", "b, 3")]
    assert [line[2] == "-" for line in styles(ax)] == [False, False, True]
    assert ax.get_ylim()[0] == pytest.approx(1e-7) and [
        tuple(v.get_ydata()) for v in ax.lines if v.get_label()[0] == "_"
    ]
    assert ax.xaxis_inverted() and list(ax.containers[0][0].get_xdata()) == [8.0, 4.0, 1.0]
    alone = plots.error_of_steps(StepErrors(tuple(steps("a", 3)), None))
    assert alone.get_title() == "steps of 3 evaluations"
    assert [t.get_text() for t in alone.get_legend().get_texts()] == ["a"]


def test_a_plot_of_one_number_of_evaluations_or_of_close_errors_has_numbers_on_its_axes():
    rows = [Row("a", 5, 0.12, 0.001), Row("b", 5, 0.14, 0.001)]
    axes = plots.error_against_nfe(Comparison(rows))
    axes.get_figure().draw_without_rendering()
    assert any(t.get_text() for t in axes.get_yticklabels(which="both"))


def test_without_matplotlib_a_plot_names_the_extra(monkeypatch, comparison):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(iia.errors.MissingDependencyError, match=r"pip install 'iia-ode\[plot\]'"):
        plots.error_against_nfe(comparison)
