"""`sbiplat simulators`: the registered ones; the card of one, with the check of its contract."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from sbiplat.cli.output import Json, show

CHECK_SECONDS = 10.0
SYMMETRY_SECONDS = 30.0  # of simulations that a symmetry is checked on


def simulators(
    name: Annotated[str | None, typer.Argument(help="A simulator: a name, file.py:object or module:object.")] = None,
    rows: Annotated[int, typer.Option(help="Rows that the contract check runs.")] = 64,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a row may take; by default the simulator's own, or 10.")] = None,
    as_json: Json = False,
) -> None:
    """List the registered simulators; with NAME, show its card and check its contract."""
    from sbiplat.bank.sandbox import check_apart
    from sbiplat.simulator import available, resolve

    if name is None:
        found = available()
        show(as_json, found, "\n".join(f"{k:20} {v}" for k, v in sorted(found.items())) or "none registered")
        return
    simulator = resolve(name)
    result = check_apart(simulator, rows, time_limit or simulator.time_limit or CHECK_SECONDS)
    card = {
        "name": simulator.name, "summary": simulator.summary, "citation": simulator.citation, "batched": simulator.batched,
        "source": simulator.spec, "source_digest": simulator.source_digest(),
        "prior": simulator.prior.to_json(), "x": simulator.x.to_json(),
        "signal": simulator.signal.to_json() if simulator.observe else None,
        "tractable": [k for k in ("log_likelihood", "posterior_log_prob", "posterior_sampler") if getattr(simulator, k)],
        "check": asdict(result) if result else None,
        "symmetry": _symmetry_of(simulator) if simulator.symmetry is not None and result else None,
    }
    show(as_json, card, _card_text(card))


def _symmetry_of(simulator: Any) -> dict[str, Any]:
    """A simulator's group action and what its contract check, in a child process, found."""
    from sbiplat.bank.sandbox import apart

    def work() -> dict[str, Any]:
        from sbiplat.symmetry.contract import check_action
        from sbiplat.symmetry.names import describe, resolve_action

        action = resolve_action(simulator)
        return {**describe(action, simulator), "check": asdict(check_action(simulator, action, seconds=SYMMETRY_SECONDS))}

    found = apart(simulator, work, 4 * SYMMETRY_SECONDS)
    return found if found is not None else {"check": None}


def _symmetry_lines(symmetry: dict[str, Any]) -> list[str]:
    check = symmetry["check"]
    if check is None:
        return [f"symmetry  check broken off after {4 * SYMMETRY_SECONDS:g} s"]
    kind, moved = "exact" if check["exact"] else "approximate", ", ".join(check["parameters"]) or "no parameter"
    on_data = ("x, inverse", "x, composition")
    laws = [v for k, v in check["algebra"].items() if check["exact"] or k not in on_data]
    lines = [f"symmetry  {check['action']}, {kind}, of {moved}; coordinates of its kernel: {', '.join(check['coordinates']) or 'none'}",
             f"  the laws of a group hold to {max(laws):.0e}; {check['statement']}"]
    if not check["exact"]:
        lines.append(f"  approximate: on x they hold to {max(check['algebra'][k] for k in on_data):.1g} of it (random numbers for x)")
    if check["kept"] is not None and check["kept"] < 1:
        lines.append(f"  {check['kept']:.1%} of moved theta stay inside the prior's support")
    if check["p_value"] is not None:
        lines.append(f"  simulate(g theta) and T_g simulate(theta) agree: p = {check['p_value']:.2g}")
    if check["difference"] is not None:
        lines.append(f"  without noise they agree to {check['difference']:.1e} of x's spread")
    told = check["inexact"] or {}
    if told.get("shift") is not None:
        lines.append(f"  approximate: means differ by {told['shift']:.2g} sd of the noise, sds by a factor of {told['noise_ratio']:.3g}")
    if told.get("difference") is not None:
        lines.append(f"  approximate: what has no noise differs by {told['difference']:.1e} of x's spread")
    return lines


def _card_text(card: dict[str, Any]) -> str:
    lines = [card["name"], f"  {card['summary']}"] + ([f"  {card['citation']}"] if card["citation"] else [])
    laws = card["prior"].get("independent")
    lines.append("parameters")
    for k, (name, unit) in enumerate(zip(card["prior"]["names"], card["prior"]["units"], strict=True)):
        law = laws[k] if laws else {}
        inside = ", ".join(f"{a}={b:g}" for a, b in law.items() if a not in ("law", "unit") and b is not None)
        text = f"{law['law']}({inside})" if laws else f"joint law: {next(k for k in card['prior'] if k not in ('names', 'units'))}"
        lines.append(f"  {name:16} {text}{' ' + unit if unit else ''}")
    x = card["x"]
    shapes = tuple(x["shapes"]["x"]) if x["plain"] else {k: tuple(v) for k, v in x["shapes"].items()}
    lines.append(f"x  {shapes} {x['dtype']}" + (f", transform {x['transform']}" if set(x["transform"].values()) != {"none"} else ""))
    if card["signal"]:
        lines.append(f"signal  {card['signal']['shapes']}: banks hold it, and observe makes x of it in every epoch")
    lines.append(f"tractable  {', '.join(card['tractable']) or 'nothing declared'}")
    if card["symmetry"]:
        lines += _symmetry_lines(card["symmetry"])
    result = card["check"]
    if result is None:
        lines.append("check broken off: its rows took longer than the time limit; give a longer --time-limit, or fewer --rows")
        return "\n".join(lines)
    lines.append(f"check passed on {result['rows']} rows: {result['finite']:.1%} finite, {result['raised']:.1%} raised"
                 + (f" ({result['first_error']})" if result["first_error"] else ""))
    return "\n".join(lines)
