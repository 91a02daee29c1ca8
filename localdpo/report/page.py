"""A run as one HTML page: no script, nothing loaded, and a policy that would refuse both.

The theme follows the system, or the choice at the top, which is plain HTML and CSS. Everything works without a mouse,
at the width of a phone, and on paper. The markup is in templates/; this module gives them their data and functions.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from localdpo import __version__
from localdpo.data.check.findings import KINDS
from localdpo.data.pairs import listed
from localdpo.report import answers, formats, measured, summary, values
from localdpo.report.charts import charts_of
from localdpo.report.differences import flat
from localdpo.report.markup import Markup, inert
from localdpo.report.palette import page_css
from localdpo.report.record import Record
from localdpo.report.svg import chart_svg, interval_svg
from localdpo.series import number_text
from localdpo.train.run import ACTIVE_STATES

__all__ = ["render", "run_page"]


def run_page(record: Record, machine: Mapping[str, Any] | None = None, now: float | None = None) -> str:
    """The page of one run. `machine` is what the page is made on (`localdpo.machine`), `now` a time since 1970."""
    return render(
        "run.html",
        record=record,
        charts=charts_of([record]),
        machine=machine or {},
        now=time.time() if now is None else now,
    )


def render(template: str, **data: Any) -> str:
    """The page that `template` makes of `data`, with what the modules of this package say in words as its functions."""
    return _environment().get_template(template).render(data)


@cache
def _environment() -> Environment:
    style = Markup(page_css())  # our own text: the one thing that is put in as it is
    environment = Environment(
        loader=PackageLoader("localdpo.report"),
        autoescape=True,
        finalize=inert,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for module in (answers, formats, measured, summary, values):
        environment.globals |= {name: getattr(module, name) for name in module.__all__}
    environment.globals |= {
        "ACTIVE_STATES": ACTIVE_STATES,
        "KINDS": KINDS,
        "chart_svg": chart_svg,
        "digest": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "flat": flat,
        "interval_svg": interval_svg,
        "number_text": number_text,
        "row_list": listed,
        "style": style,
        "version": __version__,
    }
    return environment
