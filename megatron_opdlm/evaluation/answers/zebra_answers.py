"""Logic grids (ZebraLogic): how many cells of the grid does a response's JSON get right?

The right answer is `{"header": ["House", "Name", ...], "rows": [["1", "Eric", ...], ...]}`; a response holds
`{"reasoning": ..., "solution": {"House 1": {"Name": "Eric", ...}, ...}}`, in a fence or not. The last JSON object that
names houses counts. The houses may also stand at the top, or be a list in order. Names of houses and attributes compare
by letters and digits alone, cells without regard to case and surrounding space.

    right = {"header": ["House", "Name"], "rows": [["1", "Eric"], ["2", "Ann"]]}
    zebra_cells(right, '{"solution": {"House 1": {"Name": "eric"}, "House 2": {"Name": "Bob"}}}')    # (1, 2)

A puzzle is solved when every cell is right. Source: the ZeroEval evaluation of ZebraLogic (arXiv 2502.01100).
"""

from __future__ import annotations

import json
from typing import Any


def zebra_cells(right: dict[str, Any], text: str) -> tuple[int, int]:
    """(cells that are right, cells that are asked for); the column of house numbers is not asked for."""
    attributes = right["header"][1:]
    houses = find_houses(text)
    num_right = 0
    for label, *cells in right["rows"]:
        said = houses.get(_plain(f"house{label}"), {})
        num_right += sum(said.get(_plain(name)) == _cell(cell) for name, cell in zip(attributes, cells, strict=True))
    return num_right, len(attributes) * len(right["rows"])


def find_houses(text: str) -> dict[str, dict[str, str]]:
    """Cells by attribute by house, all in plain spelling, of the last JSON object that has houses; empty if none."""
    for found in reversed(json_objects(text)):
        solution = found.get("solution", found)
        if isinstance(solution, list):
            solution = {f"house{number}": house for number, house in enumerate(solution, start=1)}
        if isinstance(solution, dict):
            houses = {_house(name): house for name, house in solution.items() if isinstance(house, dict)}
            if any(name.startswith("house") for name in houses):
                return {
                    name: {_plain(key): _cell(value) for key, value in house.items()} for name, house in houses.items()
                }
    return {}


def json_objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, outermost ones only, in order."""
    decoder, found, place = json.JSONDecoder(), [], text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError):
            end = place + 1
        else:
            found.append(value)
        place = text.find("{", end)
    return found


def _house(name: str) -> str:
    plain = _plain(name)
    return f"house{plain}" if plain.isdigit() else plain


def _plain(name: object) -> str:
    return "".join(letter for letter in str(name).lower() if letter.isalnum())


def _cell(value: object) -> str:
    return str(value).strip().lower()
