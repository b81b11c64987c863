"""The page, drawn on the server: all of it at first, and the parts that change once a second."""

from collections import Counter
from dataclasses import dataclass
from importlib.resources import files

from cacheinval.latencies import BUCKETS
from cacheinval.page.markup import NOTHING, Html, html, joined, milliseconds, seconds
from cacheinval.verdict.fleet import Condition, Fate, Fleet
from cacheinval.verdict.judging import Level, Verdict, judge
from cacheinval.verdict.member import Lag, Member
from cacheinval.verdict.reports import Identity, Report
from cacheinval.verdict.words import clock_time, cut, plural
from cacheinval.verdict.writes import Line

__all__ = ["View", "draw", "unsure", "whole"]

MOST_ROWS = 200
MOST_LINES = 25
MOST_CHIPS = 8
SLOWEST = 3
ID_END = 8
"""Characters from the end of a long id by which instances are told apart in a line."""

_PAGE = Html((files("cacheinval.page") / "page.html").read_text(encoding="utf-8"))

WORDS = {
    Condition.FRESH: "fresh",
    Condition.STARTING: "starting",
    Condition.UNPROVEN: "not proven",
    Condition.UNKNOWN: "not asked",
    Condition.SILENT: "silent",
    Condition.SUSPECT: "suspect",
    Condition.GONE: "gone",
}
TONES = {
    Condition.FRESH: "good",
    Condition.STARTING: "warning",
    Condition.UNKNOWN: "warning",
    Condition.GONE: "quiet",
}
TITLES = {Level.GOOD: "Fresh", Level.WARNING: "Not sure yet", Level.BAD: "May be stale"}
LABELS = {0.001: "1 ms", 0.01: "10 ms", 0.1: "0.1 s", 1.0: "1 s", 10.0: "10 s"}
ORDER = {condition: place for place, condition in enumerate(Condition)}


@dataclass(frozen=True, slots=True)
class View:
    """What is shown at one moment: the title of the window, and the parts by the ids of their elements."""

    title: str
    level: Level
    parts: dict[str, Html]


def draw(fleet: Fleet, here: Report, now: float) -> View:
    """What is to be seen at `now` by the process that reports `here`."""
    verdict = judge(fleet, here, now)
    parts = {
        "about": _about(here, now),
        "verdict": _verdict(verdict),
        "fleet": _fleet(fleet, here, now),
        "lag": _lag(fleet),
        "writes": _writes(fleet, now),
    }
    return View(f"{TITLES[verdict.level]} · {here.namespace} · cacheinval", verdict.level, parts)


def unsure(view: View) -> View:
    """What is shown instead of `view` where what is known by now cannot be drawn."""
    verdict = Verdict(
        Level.WARNING,
        "This page cannot show how the fleet is now.",
        "What stands below is old.",
        ["See the log of this process, and the page of another one, or `cacheinval status`."],
    )
    title = f"{TITLES[verdict.level]} · {view.title.partition(' · ')[2]}"
    return View(title, verdict.level, view.parts | {"verdict": _verdict(verdict)})


def whole(view: View) -> bytes:
    """The page as it is sent first, and as it stays without JavaScript."""
    return html(_PAGE, title=view.title, level=view.level, **view.parts).encode()


def _about(here: Report, now: float) -> Html:
    return html(
        "<span>namespace <b>{namespace}</b></span> <span>seen by <b>{id}</b></span>"
        ' <span class="clock"><time>{time}</time> UTC</span>',
        namespace=here.namespace,
        id=here.id,
        time=clock_time(now),
    )


def _verdict(verdict: Verdict) -> Html:
    good = verdict.level is Level.GOOD and verdict.detail.startswith("proven")
    beside = html('<span class="beside">: {detail}</span>', detail=verdict.detail) if good else Html()
    below = (
        Html()
        if good or not verdict.detail
        else html('<p class="detail">{detail}</p>', detail=verdict.detail)
    )
    steps = joined([html("<li>{step}</li>", step=_code(step)) for step in verdict.todo])
    todo = html('<h2>What to do</h2><ul class="todo">{steps}</ul>', steps=steps) if steps else Html()
    return html(
        '<div class="answer {level}"><span class="mark" aria-hidden="true"></span><div>'
        '<h1><span id="sentence" role="status">{sentence}</span>{beside}</h1>{below}{todo}</div></div>',
        level=verdict.level,
        sentence=verdict.sentence,
        beside=beside,
        below=below,
        todo=todo,
    )


def _code(text: str) -> Html:
    """`text` with what stands between backticks as code."""
    parts = text.split("`")
    return joined(
        [html("<code>{part}</code>" if at % 2 else "{part}", part=part) for at, part in enumerate(parts)]
    )


# The fleet

HEADINGS = (
    "Instance",
    "State",
    "Proven",
    "Queue",
    "Hits",
    "Evicted / min",
    "99 % within",
    "Last gap",
    "Version",
)
NUMBERS = {"Proven", "Queue", "Hits", "Evicted / min", "99 % within"}


def _fleet(fleet: Fleet, here: Report, now: float) -> Html:
    members = sorted(fleet, key=lambda member: (ORDER[fleet.condition(member, now)], member.identity))
    if not members:
        return html('<p class="empty">No instance has answered.</p>{relay}', relay=_relay_here(fleet, here))
    head = joined(
        [
            html(
                '<th role="columnheader" scope="col" class="{kind}">{name}</th>', kind=_kind(name), name=name
            )
            for name in HEADINGS
        ]
    )
    rows = joined([_row(fleet, here, member, now) for member in members[:MOST_ROWS]])
    more = len(members) - MOST_ROWS
    return html(
        '<table role="table" class="cards" aria-labelledby="fleet-heading"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        '<tbody role="rowgroup">{rows}</tbody></table>{more}{odd}{relay}',
        head=head,
        rows=rows,
        more=html('<p class="note">and {more} more, none worse than these</p>', more=more)
        if more > 0
        else Html(),
        odd=html(
            '<p class="note">{odd} could not be understood.</p>', odd=plural(fleet.not_understood, "answer")
        )
        if fleet.not_understood
        else Html(),
        relay=_relay_here(fleet, here),
    )


def _kind(name: str) -> str:
    return "number" if name in NUMBERS else "text"


def _relay_here(fleet: Fleet, here: Report) -> Html:
    if fleet.own is not None or here.relay is None:
        return Html()
    reason = f": {here.relay.reason}" if here.relay.reason else ""
    return html(
        '<p class="note">This page is served by a relay, <b>{id}</b>: {state}{reason}.</p>',
        id=here.id,
        state=here.relay.state,
        reason=reason,
    )


def _row(fleet: Fleet, here: Report, member: Member, now: float) -> Html:
    condition = fleet.condition(member, now)
    report = member.report or Report(id=member.id, state="silent")
    lag = member.lag
    bound = lag.below(0.99)
    values = {
        "Proven": _proven(member, now),
        "Queue": NOTHING if report.queue_depth is None else f"{report.queue_depth:,}",
        "Hits": NOTHING if report.hits is None else f"{100 * report.hits:.1f} %",
        "Evicted / min": f"{lag.total:,}" if member.report else NOTHING,
        "99 % within": NOTHING if bound is None else _bound(bound),
        "Last gap": _gap(report, now),
        "Version": report.version or NOTHING,
    }
    cells = [
        html(
            '<td role="cell" class="{kind}" data-name="{name}">{value}</td>',
            kind=_kind(name) + (" nothing" if value == NOTHING else ""),
            name=name,
            value=value,
        )
        for name, value in values.items()
    ]
    where = f"{report.host}, pid {report.pid}" if report.pid is not None else report.host
    return html(
        '<tr role="row" class="{tone}" data-key="{key}"><th role="rowheader" scope="row"><bdi>{id}</bdi>{roles}'
        "<small><bdi>{where}</bdi></small></th>"
        '<td role="cell" class="state" data-name="State"><span class="mark" aria-hidden="true"></span> <b>{word}</b>{since}{reason}</td>'
        "{cells}</tr>",
        tone=TONES.get(condition, "bad"),
        key=" ".join(member.identity),
        id=member.id,
        where=where,
        roles=_roles(fleet, here, report),
        word=WORDS[condition],
        since=_since(member, condition, now),
        reason=_why(member, condition),
        cells=joined(cells),
    )


def _roles(fleet: Fleet, here: Report, report: Report) -> Html:
    roles = []
    if fleet.own is not None and report.identity == here.identity:
        roles.append(Html('<span class="role">this one</span>'))
    if report.relay is not None and report.relay.state in ("leader", "blocked"):
        roles.append(Html('<span class="role">relay</span>'))
    return joined(roles)


def _proven(member: Member, now: float) -> str:
    age = member.proven_age(now)
    return NOTHING if age is None else f"{seconds(age)} ago"


def _since(member: Member, condition: Condition, now: float) -> Html:
    if condition in (Condition.SILENT, Condition.GONE, Condition.UNKNOWN):
        since = member.seen_at if member.heard_at is None else member.heard_at
    elif member.report is None or member.report.since is None:
        return Html()
    else:
        since = member.report.since
    if condition is Condition.UNPROVEN:
        since = now - (member.proven_age(now) or now - since)
    return html(
        ' <span class="since">since <time>{time}</time>, {age}</span>',
        time=clock_time(since),
        age=seconds(now - since),
    )


def _why(member: Member, condition: Condition) -> Html:
    report = member.report
    reason: str | None = None
    if condition is Condition.SILENT:
        reason = (
            "registered in the database, and does not answer"
            if member.registered
            else "does not answer any more"
        )
    elif condition is Condition.GONE:
        reason = "it has left, or its lease has ended"
    elif condition is Condition.UNKNOWN:
        reason = "nobody can be asked now" if member.heard_at is not None else None
    elif report is not None and condition is Condition.UNPROVEN:
        reason = report.tick_refused or "no tick of the relay has come since"
    elif report is not None and condition is not Condition.FRESH:
        reason = report.why
    return html('<span class="reason"><bdi>{reason}</bdi></span>', reason=reason) if reason else Html()


def _gap(report: Report, now: float) -> Html:
    if report.last_gap is None:
        return Html(NOTHING)
    return html(
        "{age} ago<small><bdi>{reason}</bdi></small>",
        age=seconds(now - report.last_gap.at),
        reason=cut(report.last_gap.reason),
    )


# The lag


def _lag(fleet: Fleet) -> Html:
    lag = Lag()
    for member in fleet:
        lag += member.lag
    if not lag.total:
        return Html('<p class="empty">Nothing was evicted within the last minute.</p>')
    middle, most = _bound(lag.below(0.5)), _bound(lag.below(0.99))
    said = f"{plural(lag.total, 'eviction')}: half within {middle}, 99 % within {most}"
    span = "last minute" if lag.seconds > 55 else f"last {max(1.0, lag.seconds):.0f} s"
    return html(
        '<dl class="figures"><div><dt>half within</dt><dd>{middle}</dd></div><div><dt>99 % within</dt><dd>{most}</dd></div>'
        "<div><dt>evictions, {span}</dt><dd>{total}</dd></div></dl>"
        '<div class="histogram" role="img" aria-label="{said}">{bars}</div>',
        middle=middle,
        most=most,
        span=span,
        total=f"{lag.total:,}",
        said=said,
        bars=_bars(lag),
    )


def _bars(lag: Lag) -> Html:
    highest = max(lag.counts)
    bars = []
    for at, count in enumerate(lag.counts):
        bound = BUCKETS[at] if at < len(BUCKETS) else float("inf")
        height = 0.0 if not count else max(3.0, 100 * count / highest)
        bars.append(
            html(
                '<div class="bin" title="{count} within {bound}"><svg viewBox="0 0 10 100" preserveAspectRatio="none" aria-hidden="true">'
                '<rect class="ground" x="0" y="99" width="10" height="1"/><rect x="0" y="{y}" width="10" height="{height}"/></svg>'
                "<span>{label}</span></div>",
                count=f"{count:,}",
                bound=_bound(bound),
                y=f"{100 - height:.1f}",
                height=f"{height:.1f}",
                label=LABELS.get(bound, ""),
            )
        )
    return joined(bars)


def _bound(bound: float | None) -> str:
    if bound is None:
        return NOTHING
    if bound == float("inf"):
        return f"over {BUCKETS[-1]:g} s"
    return f"{bound:g} s" if bound >= 1 else f"{1000 * bound:g} ms"


# The writes


def _writes(fleet: Fleet, now: float) -> Html:
    lines = fleet.writes.newest(MOST_LINES)
    if not lines:
        return Html('<p class="empty">Nothing was written within the last minute.</p>')
    names = _names_of(fleet)
    return html(
        '<ol class="writes" reversed>{lines}</ol>',
        lines=joined([_line(fleet, line, names, now) for line in lines]),
    )


def _line(fleet: Fleet, line: Line, names: dict[Identity, str], now: float) -> Html:
    if line.reason is not None:
        who = next(iter(line.evicted))
        return html(
            '<li data-key="{number}" class="epoch"><time>{time}</time><p class="names"><bdi>{who}</bdi> dropped everything: '
            "<bdi>{reason}</bdi></p></li>",
            number=line.number,
            time=clock_time(line.at, parts=True),
            who=names.get(who, who[0]),
            reason=line.reason,
        )
    fates: dict[Fate, list[Identity]] = {fate: [] for fate in Fate}
    for member in fleet:
        fates[fleet.fate(line, member, now)].append(member.identity)
    of = len(line.evicted) + sum(len(fates[fate]) for fate in (Fate.DROPPED, Fate.PENDING, Fate.LATE))
    return html(
        '<li data-key="{number}" class="{tone}"><time>{time}</time><p class="names">{names} <span class="origin">{origin}</span></p>'
        '<p class="count"><b>{count} of {of}</b> {within}</p><ul class="chips">{chips}</ul></li>',
        number=line.number,
        tone="late" if fates[Fate.LATE] else "pending" if fates[Fate.PENDING] else "done",
        time=clock_time(line.at, parts=True),
        names=_names(line),
        origin=_origin(line),
        count=len(line.evicted) + len(fates[Fate.DROPPED]),
        of=of,
        within=f"in {milliseconds(line.slowest)}" if line.dated else "",
        chips=_chips(line, fates, names),
    )


def _names(line: Line) -> Html:
    if line.all:
        return Html("<b>everything</b>")
    names = [html('<bdi class="key">{key}</bdi> ', key=key) for key in line.keys]
    names += [html('<bdi class="key tag">#{tag}</bdi> ', tag=tag) for tag in line.tags]
    more = (
        html('<span class="more">and {more} more</span>', more=f"{line.more:,}") if line.more > 0 else Html()
    )
    return joined([*names, more])


def _origin(line: Line) -> str:
    return "by a program without an origin" if line.origin is None else f"origin {line.origin[:8]}"


FATES = {Fate.LATE: "not yet", Fate.PENDING: "…", Fate.DROPPED: "dropped everything"}


def _chips(line: Line, fates: dict[Fate, list[Identity]], names: dict[Identity, str]) -> Html:
    chips = [
        html(
            '<li class="{fate}"><bdi>{who}</bdi> <span>{text}</span></li>',
            fate=fate,
            who=names.get(who, who[0]),
            text=text,
        )
        for fate, text in FATES.items()
        for who in sorted(fates[fate])
    ]
    times = sorted(((line.after(who) or 0.0, who) for who in line.evicted), reverse=True)
    if len(times) + len(chips) <= MOST_CHIPS:
        times.sort(key=lambda time: time[1])
        return joined([*chips, *(_chip(line, who, after, names) for after, who in times)])
    shown = [*chips[:MOST_CHIPS], *(_chip(line, who, after, names) for after, who in times[:SLOWEST])]
    for rest, text in ((len(chips) - MOST_CHIPS, "more not"), (len(times) - SLOWEST, "more")):
        if rest > 0:
            shown.append(html('<li class="rest">{rest} {text}</li>', rest=f"{rest:,}", text=text))
    return joined(shown)


def _chip(line: Line, who: Identity, after: float, names: dict[Identity, str]) -> Html:
    text = "wrote it" if line.evicted[who].own else milliseconds(after) if line.dated else "evicted"
    return html("<li><bdi>{who}</bdi> <span>{text}</span></li>", who=names.get(who, who[0]), text=text)


def _names_of(fleet: Fleet) -> dict[Identity, str]:
    """Their ids, and of several that share one their processes, too; what is long by its end, where that tells them apart."""
    ids = Counter(member.id for member in fleet)
    short = {id_: id_ if len(id_) <= 2 * ID_END else f"…{id_[-ID_END:]}" for id_ in ids}
    if len(set(short.values())) < len(ids):
        short = {id_: id_ for id_ in ids}
    return {
        member.identity: short[member.id] + (_process(member) if ids[member.id] > 1 else "")
        for member in fleet
    }


def _process(member: Member) -> str:
    report = member.report
    return "" if report is None or report.pid is None else f" ({report.host}, pid {report.pid})"
