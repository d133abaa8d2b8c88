"""Heat maps of the gates: how each block weighs its three branches, validation by validation."""

from vip.page.chart import Chart, Trace, shown
from vip.page.run import Run

BRANCHES = ("height", "width", "channel")


def gates(run: Run) -> list[Chart]:
    """A chart for each branch, with one colour scale; nothing for networks without gates."""
    steps = sorted(run.gates)
    if not steps:
        return []
    epochs = [step * run.per_step("epoch") for step in steps]
    blocks = [str(row[0]) for row in run.gates[steps[-1]]]
    columns = [{str(row[0]): row[1:] for row in run.gates[step]} for step in steps]
    weights = [[column.get(block) for column in columns] for block in blocks]
    found = [weight for row in weights for cell in row if cell for weight in cell if weight is not None]
    if not found:
        return []
    charts = []
    for branch, name in enumerate(BRANCHES):
        heat: Trace = {
            "type": "heatmap",
            "x": [0.0, *epochs]
            if epochs[0] > 0
            else [*epochs, epochs[-1] + 1],  # edges of columns, each up to its epoch
            "y": list(range(len(blocks))),
            "z": [[cell and cell[branch] for cell in row] for row in weights],
            "zmin": min(found),
            "zmax": max(found),
            "colorscale": "Cividis",
            "colorbar": {"thickness": 8, "outlinewidth": 0, "nticks": 5},
            "text": [[shown(block)] * len(steps) for block in blocks],
            "hovertemplate": "block %{text}: %{z:.3f}<extra></extra>",
            "meta": {"run": 0},
        }
        names = {"tickvals": heat["y"], "ticktext": [shown(block, 16) for block in blocks]}
        yaxis = names | {"autorange": "reversed", "showgrid": False}
        layout = {"yaxis": yaxis, "hovermode": "closest", "ends": [run.last_epoch]}
        alt = f"Heat map of the gate's {name} weight in {len(blocks)} blocks over {len(steps)} validations"
        height = 90 + max(14 * len(blocks), 130)
        charts.append(
            Chart(f"gate-{name}", f"{name.capitalize()} branch", "", [heat], layout, True, height=height, alt=alt)
        )
    return charts
