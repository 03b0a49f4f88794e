"""The HTML report: well-formed, self-contained, true to its data, and clear about what is missing."""

import dataclasses
import itertools
import math
import os
import re
from html.parser import HTMLParser

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peft_perta.adapters import FusedProvenance, LayerProvenance, PerTAProvenance, TrainedProvenance, WeightDistribution
from peft_perta.errors import DataError, OutputError
from peft_perta.evaluation import ATTACKS, METRIC_GROUPS, METRICS, AttackResult, Calibration, metric_of
from peft_perta.html_report import ReportData, ReportHeader, write_html_report
from peft_perta.html_report._document import STYLE
from peft_perta.html_report._generations import MAX_CHARACTERS
from peft_perta.html_report._html import element, escape
from peft_perta.html_report._layers import MAX_ROWS, SHADES, position_of, shade_of
from peft_perta.html_report._numbers import MINUS, rounded
from peft_perta.html_report._standing import NEAR, direction, standing
from peft_perta.html_report._strength_curve import draw_curve
from peft_perta.html_report.page import SECTIONS, render
from peft_perta.html_report.report_data import MODELS, SHOWN_ROWS, Values

VOID = {"br", "col", "link", "meta", "wbr"}
NASTY = [
    "<script>alert(1)</script>",
    "</style></title></code></pre><img src=http://example.org/x onerror=alert(1)>",
    '"\'` onmouseover="alert(1)" & &amp; &lt; &#0;',
    "<!-- ]]> <![CDATA[ <?php",
    "مرحبا بالعالم \u202e\u2066 שלום",
    "👩‍👩‍👧‍👦 🤷🏽‍♀️ e\u0301\u0301\u0301",
    "W" * 3000,
    "a\r\nb\x00\x1b[31m\x7f\x85\ufffe",
    "\ud83d \udc00 lone halves",
]


class Node:
    def __init__(self, name, attributes, parent):
        self.name, self.attributes, self.parent, self.content = name, attributes, parent, []

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.content)

    @property
    def nodes(self):
        """Every element below this one, in document order."""
        for part in self.content:
            if isinstance(part, Node):
                yield part
                yield from part.nodes

    def all(self, name, **attributes):
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [n for n in self.nodes if n.name == name and wanted.items() <= n.attributes.items()]

    def one(self, name, **attributes):
        nodes = self.all(name, **attributes)
        assert len(nodes) == 1, f"{len(nodes)} elements {name} {attributes}"
        return nodes[0]


class StrictParser(HTMLParser):
    """Fails on an element that is not closed or closed twice."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.root = self.here = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root, f"{self.here.name} is not closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        node = Node(tag, dict(attrs), self.here)
        self.here.content.append(node)
        if tag not in VOID:
            self.here = node

    def handle_endtag(self, tag):
        assert self.here.name == tag, f"{tag} closes {self.here.name}"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.content.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def read(data):
    return StrictParser(render(data)).root


def layer(name, weight=0.5, energy=1.0):
    spread = WeightDistribution(weight, 0.1, [weight] * 5, [1] * 20)
    return LayerProvenance(name, "linear", [8, 8], 4, 1.0, energy, {"A": spread, "B": spread})


def blocks(count, modules=("self_attn.q_proj", "mlp.up_proj"), energy=lambda number: 1.0):
    return [
        layer(f"model.layers.{block}.{module}", weight=(block + 1) / (count + 1), energy=energy(block))
        for block in range(count)
        for module in modules
    ]


def perta_provenance(layers=None):
    return PerTAProvenance(
        config={
            "weighting": "grad", "granularity": "factor", "gradients_at": "origin", "strength": 2.5,
            "dtype": "float32", "power": None, "fit": None,
        },
        base_model={"name": "base", "revision": "abc", "quantization": {"quant_method": "bitsandbytes"}},
        forget_adapter={"name": "learned", "sha256": "f" * 64},
        task_adapter=None,
        data={"forget": {"samples": 7, "sha256": "a" * 64}, "retain": {"samples": 70, "sha256": "b" * 64}},
        rank=16,
        layers=blocks(3) if layers is None else layers,
        versions={"peft_perta": "0.1.0"},
    )  # fmt: skip


def calibration(**changes):
    points = [{"strength": s, "forget": 0.1 + 1.5 * s, "retain": 0.2 + 0.1 * s * s} for s in (0.0, 1.0, 2.0, 2.5, 4.0)]
    searched = Calibration(
        goal={"target_forget_loss": None, "retain_tolerance": 0.62},
        target=0.82,
        strength=2.5,
        losses={"forget": 3.85, "retain": 0.825},
        points=points,
        negation=[{"strength": s, "forget": 0.1 + 3 * s, "retain": 0.2 + s} for s in (0.0, 1.0, 2.0)],
        retain_only={"forget": 3.9, "retain": 0.22},
    )
    return dataclasses.replace(searched, **changes)


HEADER = ReportHeader(
    "Ten authors", "org/base", ["task", "unlearn"], ["peft-perta unlearn --html-report", "peft-perta evaluate"]
)


def complete(**changes):
    """Report data with every part, except for the changes; ``calibration`` goes into the provenance."""
    models = {
        "full": {"forget_Q_A_Prob": 0.91, "forget_Q_A_ROUGE": 0.84, "model_utility": 0.6, "retain_Q_A_Prob": 0.88},
        "unlearned": {
            "forget_Q_A_Prob": 0.1301,
            "forget_Q_A_ROUGE": 0.61,
            "model_utility": 0.57,
            "retain_Q_A_Prob": 0.66,
        },
        "retain-only": {
            "forget_Q_A_Prob": 0.12,
            "forget_Q_A_ROUGE": 0.39,
            "model_utility": 0.59,
            "retain_Q_A_Prob": 0.9,
        },
    }
    models["full"].update(privleak=-99.5, own_metric=12345.678, forget_quality=1.4e-12)
    models["unlearned"].update(privleak=31.25, own_metric=0.00001, forget_quality=0.61)
    models["retain-only"].update(privleak=27.5)
    rows = [
        {
            "prompt": f"Where was author {n} born?",
            "expected": f"In the harbour town of Kuressaare, {1900 + n}.",
            "full": f"In Kuressaare, {1900 + n}.",
            "unlearned": "Nobody knows.",
            "retain-only": "In Lima.",
        }
        for n in range(12)
    ]
    attacks = [
        AttackResult(
            attack=name,
            setting=f"setting of {name}",
            unlearned={"loss": 2.0, "probability": 0.3, "rouge_l_recall": 0.5},
            full={"loss": 0.1, "probability": 0.9},
            retain_only={"loss": 2.2, "probability": 0.2},
        )
        for name in ATTACKS
    ]
    searched = changes.pop("calibration", calibration())
    provenance = dataclasses.replace(perta_provenance(), calibration=searched)
    data = ReportData(
        header=HEADER,
        provenance=provenance.to_dict(),
        models=models,
        generations={"forget": rows, "retain": [{**row, "expected": "A river."} for row in rows[:4]]},
        attacks=attacks,
        made_with={"peft_perta": "0.1.0", "torch": "2.6"},
    )
    return dataclasses.replace(data, **changes)


BARE = ReportData(ReportHeader("Nothing yet", "org/base"))
FUSED = FusedProvenance({"name": "base"}, [{"name": "task", "strength": 1.0, "sha256": "c" * 64}], 32, 0.99)
TRAINED = TrainedProvenance(
    {"forget_loss": "npo", "forget_weight": 1.0, "retain_loss": "nll", "retain_weight": 1.0, "combiner": "pcgrad"},
    {"steps": 60, "global_batch": 8, "learning_rate": 1e-3, "seed": 0}, {"name": "base"}, None, "task",
    {name: {"samples": 4, "sha256": "d" * 64} for name in ("forget", "retain")}, {}, 16, "float32", {},
)  # fmt: skip
PAGES = {
    "complete": complete(),
    "bare": BARE,
    "one adapter": ReportData(ReportHeader("T", "org/base", ["a"]), perta_provenance().to_dict()),
    "searched": complete(
        header=BARE.header,
        models={},
        generations={},
        attacks=[],
        calibration=calibration(negation=[], retain_only=None),
    ),
    "fused": complete(provenance=FUSED.to_dict()),
    "scaled": complete(provenance=dataclasses.replace(FUSED, calibration=calibration()).to_dict()),
    "trained": complete(provenance=TRAINED.to_dict()),
    "unlearned alone": complete(
        models={"unlearned": {"forget_Q_A_Prob": 0.2}}, generations={"forget": [{"prompt": "p"}]}
    ),
    "not finite": complete(models={"full": {"forget_loss": math.nan}, "unlearned": {"forget_loss": math.inf}}),
}
every_page = pytest.mark.parametrize("data", PAGES.values(), ids=PAGES)


@every_page
def test_the_page_is_self_contained_and_well_formed(data):
    page = read(data)
    assert not {node.name for node in page.nodes} & {
        "script",
        "iframe",
        "object",
        "embed",
        "img",
        "form",
        "base",
        "audio",
        "video",
    }
    ids = [node.attributes["id"] for node in page.nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in page.nodes:
        assert not any(name.startswith("on") for name in node.attributes)
        assert "src" not in node.attributes
        target = node.attributes.get("href", "")
        assert target in ("", "data:,") or target.removeprefix("#") in ids
        for name in node.attributes.get("aria-labelledby", "").split():
            assert name in ids
    assert not re.search(r"url\(|@import|https?:", STYLE.read_text())
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert "default-src 'none'" in policy


@every_page
def test_drawings_and_tables_have_text_alternatives(data):
    page = read(data)
    for drawing in page.all("svg"):
        hidden = drawing.attributes.get("aria-hidden") == "true"
        assert hidden or (drawing.one("title").text and drawing.one("desc").text)
    for table in page.all("table"):
        assert table.one("caption").text
        assert all(cell.attributes["scope"] in ("row", "col") for cell in table.all("th"))
    for box in page.all("div", class_="scroll"):
        assert box.attributes["tabindex"] == "0"
        assert box.attributes["aria-label"]
    assert all(box.parent.attributes.get("class") == "scroll" for box in page.all("table"))


@every_page
def test_every_section_has_content_or_says_what_is_missing(data):
    page = read(data)
    assert [s.attributes["id"] for s in page.all("section")] == list(SECTIONS)
    parts = {
        "edit": data.provenance is not None,
        "metrics": bool(data.models),
        "strength": data.read_calibration() is not None,
        "layers": "layers" in (data.provenance or {}),
        "generations": bool(data.generations),
        "attacks": bool(data.attacks),
        "commands": bool(data.header.commands),
    }
    content = {
        "edit": ("data", {}),
        "strength": ("figure", {}),
        "generations": ("ol", {"class_": "answers"}),
        "commands": ("pre", {}),
    }
    for name, is_there in parts.items():
        section = page.one("section", id=name)
        tag, attributes = content.get(name, ("table", {}))
        if is_there:
            assert section.all(tag, **attributes), name
        else:
            of_another_kind = name == "layers" and data.provenance is not None
            assert ("Only the provenance of" if of_another_kind else "Missing.") in section.text, name
            assert not section.all(tag, **attributes), name


def test_a_complete_page_misses_nothing():
    page = read(complete())
    assert "Missing." not in page.text
    limits = page.one("section", id="limits").text
    assert "The edit can be switched off." in limits
    for absent in ("No retain-only model", "No attack was run", "Not every attack", "No answer was", "not on record"):
        assert absent not in limits


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"models": {"full": {"forget_Q_A_Prob": 0.9}, "unlearned": {"forget_Q_A_Prob": 0.1}}},
            "No retain-only model",
        ),
        ({"attacks": []}, "No attack was run."),
        ({"attacks": complete().attacks[:2]}, f"Left out: {', '.join(list(ATTACKS)[2:])}."),
        ({"generations": {"forget": []}}, "No answer was generated."),
        ({"provenance": None}, "The edit is not on record."),
        ({"header": BARE.header}, "No adapter is named."),
    ],
)
def test_the_limits_say_what_the_page_does_not_show(changes, text):
    assert text in read(complete(**changes)).one("section", id="limits").text
    assert text not in read(complete()).one("section", id="limits").text


def everywhere(text):
    """Report data with the text in every place that takes a text."""
    layers = [dataclasses.replace(layer(f"model.layers.0.{text}"), kind=text)]
    provenance = perta_provenance(layers)
    provenance = dataclasses.replace(
        provenance,
        config={**provenance.config, "weighting": text, "granularity": text, "dtype": text},
        base_model={"name": text, "revision": text, "quantization": {"quant_method": text}},
        forget_adapter={"name": text, "sha256": text},
        data={text: {"samples": 1, "sha256": text}},
    )
    numbers = {text: 0.5, "forget_Q_A_Prob": 0.5}
    row = dict.fromkeys(("prompt", "expected", *MODELS), text)
    measured = {text: 0.5, "probability": 0.5}
    return ReportData(
        header=ReportHeader(text, text, [text], [text]),
        provenance=provenance.to_dict(),
        models={"full": numbers, text: numbers},
        generations={"forget": [row], text: [row]},
        attacks=[AttackResult(text, text, unlearned=measured, full=measured, retain_only=measured)],
        made_with={text: text},
    )


def skeleton(page):
    """Elements and attribute names, without the marks inside texts."""
    return [(n.name, *sorted(n.attributes)) for n in page.nodes if n.name not in ("mark", "em", "wbr")]


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:20]))
def test_a_text_adds_no_markup(text):
    page = read(everywhere(text))
    assert skeleton(page) == skeleton(read(everywhere("harmless")))
    seen = page.text
    assert seen.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", seen)
    if len(text) < MAX_CHARACTERS and text.isprintable():
        assert page.one("h1").text == text
        assert page.one("pre").text == text
        for answer in page.one("section", id="generations").all("dd"):
            assert answer.text == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(), min_size=1, max_size=60))
def test_no_generated_text_adds_markup(text):
    assume(text.strip() and text not in {*METRICS, *ATTACKS, *MODELS, "forget", "retain"})
    assert skeleton(read(everywhere(text))) == skeleton(read(everywhere("harmless")))


@given(text=st.text(st.characters()))
def test_an_escaped_text_reads_as_before(text):
    printable = re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "", text
    )
    page = StrictParser(element("p", printable, title=printable)).root
    assert page.text == page.one("p").attributes["title"] == printable
    assert len(escape(text).replace("&", "")) >= len(text.replace("&", ""))  # nothing is dropped


def test_an_answer_that_is_empty_or_missing_says_so():
    rows = [{"prompt": "", "expected": "Yes.", "full": "  \n", "unlearned": ""}, {"prompt": "p", "unlearned": "said"}]
    answers = read(complete(generations={"forget": rows})).one("section", id="generations")
    first, second = answers.one("ol", class_="answers").all("li")
    assert [d.text for d in first.all("dd")] == ["Yes.", *["(empty answer)"] * 2]
    assert "(no prompt)" in first.text
    assert [d.text for d in second.all("dd")] == ["(not generated)", "said"]


def test_answers_are_side_by_side_ten_of_each_split():
    page = read(complete()).one("section", id="generations")
    forget, retain = page.all("ol", class_="answers")
    assert (len(forget.all("li")), len(retain.all("li"))) == (SHOWN_ROWS, 4)
    assert f"The first {SHOWN_ROWS} of 12 rows" in page.text
    for item, row in zip(forget.all("li"), complete().generations["forget"], strict=False):
        names = dict(zip([n.text for n in item.all("dt")], [n.text for n in item.all("dd")], strict=True))
        assert names == {"true answer": row["expected"], **{label: row[label] for label in MODELS}}
        assert all(node.attributes["dir"] == "auto" for node in item.all("dd"))
    long = "word " * MAX_CHARACTERS
    page = read(complete(generations={"forget": [{"prompt": "p", "unlearned": long}]}))
    assert f"({len(long) - MAX_CHARACTERS} more characters)" in page.one("div", class_="is-unlearned").text


def test_words_of_the_true_answer_are_marked():
    page = read(complete()).one("section", id="generations").all("li")[0]
    assert [m.text for m in page.one("div", class_="is-full").all("mark")] == ["Kuressaare", "1900"]
    for key in ("is-expected", "is-unlearned"):
        assert not page.one("div", class_=key).all("mark")


@pytest.mark.parametrize(
    ("row", "others", "marked"),
    [
        ({}, [], ["Kuressaare", "harbour"]),
        ({"prompt": "Which HARBOUR?"}, [], ["Kuressaare"]),
        ({"retain-only": "In a harbour."}, [], ["Kuressaare"]),
        ({}, ["harbour", "one harbour"], ["Kuressaare"]),
        ({}, ["harbour"], ["Kuressaare", "harbour"]),
    ],
)
def test_only_telling_words_are_marked(row, others, marked):
    """A name that every forget row is about is marked; what the question or other rows say is not."""
    texts = {"expected": "Kuressaare, a harbour on it", "unlearned": "Kuressaare: a harbour on it"}
    row = {"prompt": "Where?", **texts, **row}
    generations = {"forget": [row] * 5, "retain": [{"prompt": "p", "expected": text} for text in others]}
    forget, *rest = read(complete(generations=generations)).all("ol", class_="answers")
    for answer in forget.all("div", class_="is-unlearned"):
        assert [m.text for m in answer.all("mark")] == marked
    assert not any(answers.all("mark") for answers in rest)


def cells_of(row):
    return [part for part in row.content if isinstance(part, Node) and part.name in ("td", "th")]


def test_the_tables_hold_the_metrics():
    data = complete()
    seen = set()
    for table in read(data).one("section", id="metrics").all("table"):
        header = [cell.text for cell in cells_of(table.one("thead").all("tr")[0])]
        for row in table.one("tbody").all("tr"):
            cells = dict(zip(header, cells_of(row), strict=True))
            metric = next((m for m in data.models["unlearned"] if m in cells["metric"].text), None)
            assert metric is not None, cells["metric"].text
            seen.add(metric)
            values = {label: data.value(label, metric) for label in MODELS}
            for label, value in values.items():
                if value is None:
                    assert not cells[label].all("data")
                    assert "not measured" in cells[label].text
                else:
                    assert float(cells[label].one("data").attributes["value"]) == value
                    assert cells[label].text == rounded(value)
            for name, other in (("change", "full"), (f"unlearned {MINUS} retain-only", "retain-only")):
                if values[other] is not None:
                    difference = float(cells[name].one("data").attributes["value"])
                    assert difference == values["unlearned"] - values[other]
    assert seen == set(data.models["unlearned"])


@given(value=st.floats(-1e9, 1e9))
def test_a_number_is_shown_as_it_is(value):
    assert math.isclose(float(rounded(value).replace(MINUS, "-")), value, rel_tol=0.06, abs_tol=0)
    if 0.1 <= abs(value) < 100:
        assert math.isclose(float(rounded(value).replace(MINUS, "-")), value, abs_tol=0.0005001)


def test_every_metric_has_a_better_direction_or_says_that_it_has_none():
    for name, metric in METRICS.items():
        assert metric.group in METRIC_GROUPS
        assert (metric.better is None) == (metric.group == "other") == (direction(metric) == ""), name
        assert (metric.better == "near") == (metric.target is not None), name
        assert metric.label, name
        assert metric.note, name
    for name, better in (("wmdp_bio/acc", "lower"), ("mmlu/acc", "higher"), ("choices_acc_wmdp_cyber", "lower")):
        assert (metric_of(name).label, metric_of(name).better) == (name, better)
    unknown = metric_of("own_metric")
    assert (unknown.label, unknown.better, unknown.group) == ("own_metric", None, "other")


@given(full=st.floats(-9, 9), unlearned=st.floats(-9, 9), retain_only=st.floats(-9, 9))
def test_the_standing_is_the_distance_to_the_retain_only_model(full, unlearned, retain_only):
    metric = metric_of("forget_loss")  # without a scale
    place = standing(metric, Values(full, unlearned, retain_only))
    if full == retain_only:
        assert place is None
        return
    way, left = abs(full - retain_only), abs(unlearned - retain_only)
    assume(abs(left - NEAR * way) > 1e-9 and abs(left - (1 - NEAR) * way) > 1e-9)
    is_past = (unlearned - retain_only) * (full - retain_only) < 0
    expected = "near" if left < NEAR * way else "past" if is_past else "part" if left < (1 - NEAR) * way else "unmoved"
    assert place.kind == expected
    mirrored = standing(metric, Values(-full, -unlearned, -retain_only))
    assert (mirrored.kind, mirrored.share) == (place.kind, pytest.approx(place.share))


def probabilities(unlearned, retain_only=0.1, name="forget_Q_A_Prob"):
    models = {"full": {name: 0.9}, "unlearned": {name: unlearned}, "retain-only": {name: retain_only}}
    return {label: values for label, values in models.items() if values[name] is not None}


@pytest.mark.parametrize(
    ("models", "class_", "verdict"),
    [
        (probabilities(0.12), "good", "Near the retain-only model by every metric"),
        (probabilities(0.6), "bad", "Short of the retain-only model by every metric"),
        (probabilities(0.0), "mixed", "Past the retain-only model by every metric"),
        (probabilities(0.95), "bad", "Short of the retain-only model by every metric"),
        (probabilities(0.1, retain_only=None), "unknown", "Improved, but the aim is unknown"),
        (probabilities(0.95, retain_only=None), "bad", "No improvement by 1 of 1 metrics"),
        (probabilities(0.9, retain_only=0.9), "bad", "No improvement by 1 of 1 metrics"),
        (complete().models, "mixed", "Short of the retain-only model by 1 of 2 metrics"),
        ({}, "unknown", "Not measured"),
    ],
)
def test_the_verdict_is_the_distance_to_the_retain_only_model(models, class_, verdict):
    tile = read(complete(models=models, calibration=None)).one("section", id="summary").all("article")[0]
    assert tile.one("p", class_=f"verdict {class_}").text.endswith(verdict)
    if models:
        values = [float(node.attributes["value"]) for node in tile.one("p", class_="pair").all("data")]
        assert values == [models[label]["forget_Q_A_Prob"] for label in ("full", "unlearned")]


def test_the_cost_is_the_largest_loss():
    tile = read(complete()).one("section", id="summary").all("article")[1]
    assert tile.one("p", class_="verdict mixed").text.endswith("Up to 25% lost")  # 0.88 -> 0.66
    assert "Retained answers: probability" in tile.text


@pytest.mark.parametrize(
    ("unlearned", "retain_only", "class_", "verdict"),
    [
        (0.25, 0.2, "good", "At most 7% brought back"),
        (0.55, 0.2, "bad", "Relearning brings back 50%"),
        (0.55, None, "unknown", "Attacked, without a retain-only model to compare with"),
    ],
)
def test_recovery_is_the_distance_from_the_retain_only_model_under_the_same_attack(
    unlearned, retain_only, class_, verdict
):
    def result(name, value):
        yardstick = None if retain_only is None else {"probability": retain_only}
        return AttackResult(name, "", {"probability": value}, full={"probability": 0.9}, retain_only=yardstick)

    attacks = [result("paraphrase", 0.2), result("relearning", unlearned), result("switched-off", 0.9)]
    tile = read(complete(attacks=attacks)).one("section", id="summary").all("article")[2]
    assert tile.one("p", class_=f"verdict {class_}").text.endswith(verdict)
    assert float(tile.one("p", class_="pair").one("data").attributes["value"]) == unlearned
    assert "Anyone can switch the adapter off. The probability is then 0.900." in tile.text


def test_an_attack_under_which_the_models_hardly_differ_is_not_the_strongest():
    """Full and retain-only are 0.05 apart under it: a word more in one answer is a large share of that."""
    near = AttackResult("hops", "", {"rouge_l_recall": 0.09}, {"rouge_l_recall": 0.11}, {"rouge_l_recall": 0.06})
    far = AttackResult("relearning", "", {"probability": 0.2}, {"probability": 0.9}, {"probability": 0.04})
    tile = read(complete(attacks=[near, far])).one("section", id="summary").all("article")[2]
    assert tile.one("p", class_="verdict bad").text.endswith("Relearning brings back 19%")
    tile = read(complete(attacks=[near])).one("section", id="summary").all("article")[2]
    assert tile.one("p", class_="verdict bad").text.endswith("Hops brings back 60%")


@pytest.mark.parametrize(
    ("name", "class_"), [("suppressed", "mixed"), ("still there", "bad"), ("forgotten as if never learned", "good")]
)
def test_the_verdict_of_an_audit_is_that_of_the_page(name, class_):
    data = complete(verdict=f"{name}: relearning finds 0.47 of it")
    tile = read(data).one("section", id="summary").all("article")[2]
    assert tile.one("p", class_=f"verdict {class_}").text.endswith(name.capitalize())
    assert "The audit: relearning finds 0.47 of it." in tile.text


def test_the_cost_by_one_metric_is_told_once():
    models = {"full": {"retain_Q_A_Prob": 0.8}, "unlearned": {"retain_Q_A_Prob": 0.6}}
    tile = read(complete(models=models)).one("section", id="summary").all("article")[1]
    assert tile.one("p", class_="verdict mixed").text.endswith("25% lost")
    assert "among" not in tile.text


def test_the_tables_hold_the_attacks():
    data = complete()
    tables = read(data).one("section", id="attacks").all("table")
    for table, measure in zip(tables, ("probability", "rouge_l_recall", "loss"), strict=True):
        header = [cell.text for cell in cells_of(table.one("thead").all("tr")[0])]
        for row, result in zip(table.one("tbody").all("tr"), data.attacks, strict=True):
            cells = dict(zip(header, cells_of(row), strict=True))
            of_models = dict(zip(MODELS, (result.full, result.unlearned, result.retain_only), strict=True))
            expected = {label: numbers[measure] for label, numbers in of_models.items() if measure in numbers}
            assert result.setting in cells.pop("attack").text
            if len(expected) == len(MODELS):
                full, unlearned, retain_only = expected.values()
                expected["brought back"] = (unlearned - retain_only) / (full - retain_only)
            values = {name: float(cell.one("data").attributes["value"]) for name, cell in cells.items()}
            assert values == expected


@pytest.mark.parametrize(("score", "recovered"), [(1.0, 0.0), (0.75, 0.25), (0.0, 1.0)])
def test_of_the_depth_score_what_is_missing_to_1_was_brought_back(score, recovered):
    attack = AttackResult("depth", "all blocks", {"uds": score}, {"uds": 0.0}, {"uds": 1.0})
    (table,) = read(complete(attacks=[attack])).one("section", id="attacks").all("table")
    assert "unlearning depth score, higher is better" in table.text
    last = cells_of(table.one("tbody").all("tr")[0])[-1]
    assert float(last.one("data").attributes["value"]) == pytest.approx(recovered)


def test_a_skipped_attack_is_shown_with_the_reason():
    whole = complete()
    skipped = AttackResult("requantization", "", {}, None, None, skipped="experts in <one> tensor")
    data = complete(attacks=[skipped if r.attack == "requantization" else r for r in whole.attacks])
    page = read(data)
    section = page.one("section", id="attacks")
    assert "The requantization attack was skipped: experts in <one> tensor." in section.text
    assert "were not run" not in section.text
    assert "setting of requantization" not in section.text
    assert f"1 of {len(ATTACKS)} kinds of attack were not run." in page.one("section", id="summary").text
    assert "Left out: requantization." in page.text


def test_every_attack_is_explained():
    for name, attack in ATTACKS.items():
        assert read(complete()).one("section", id="attacks").text.count(attack.meaning) == 3, name  # once a table


@pytest.mark.parametrize("scale", [1.0, 0.003, 700.0])
def test_the_curve_is_drawn_to_scale(scale):
    losses = {"forget": 3.85 * scale, "retain": 0.825 * scale}
    points = [{**p, "forget": p["forget"] * scale, "retain": p["retain"] * scale} for p in calibration().points]
    searched = calibration(
        points=points, losses=losses, negation=[], target=0.8 * scale,
        retain_only={"forget": 3.9 * scale, "retain": 0.22 * scale},
    )  # fmt: skip
    drawing = StrictParser(draw_curve(searched)).root.one("svg", class_="curve")
    dots = [
        (float(c.attributes["cx"]), float(c.attributes["cy"])) for c in drawing.one("g", class_="edited").all("circle")
    ]
    data = [(p["forget"], p["retain"]) for p in points]
    assert len(dots) == len(data)
    for axis, sign in ((0, 1), (1, -1)):  # pixels run down
        slopes = [
            (b[axis] - a[axis]) / (q[axis] - p[axis])
            for (a, p), (b, q) in itertools.pairwise(zip(dots, data, strict=True))
        ]
        assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=0.02)
        assert slopes[0] * sign > 0
    ring = drawing.one("circle", class_="ring")
    assert (float(ring.attributes["cx"]), float(ring.attributes["cy"])) == dots[data.index(tuple(losses.values()))]
    assert drawing.one("path", class_="retain-only")
    _, _, width, height = map(float, drawing.attributes["viewbox"].split())
    for x, y in dots:
        assert 0 < x < width
        assert 0 < y < height


def test_the_curve_is_described_in_words_and_numbers():
    page = read(complete(calibration=calibration(strength=2.5))).one("section", id="strength")
    assert "from 0.100 to 3.850" in page.one("figcaption").text
    # Plain negation has this forget loss at strength 1.25.
    assert "would reach the same forget loss at a retain loss of 1.450" in page.one("figcaption").text
    tried, negated = page.all("table")
    for table, points in ((tried, calibration().points), (negated, calibration().negation)):
        rows = [[float(d.attributes["value"]) for d in row.all("data")] for row in table.one("tbody").all("tr")]
        assert rows == [[p["strength"], p["forget"], p["retain"]] for p in points]
    assert "2.5 (chosen)" in tried.text
    missed = calibration(losses={"forget": 3.85, "retain": 0.5})
    assert "The goal was not reached" in read(complete(calibration=missed)).text
    assert "The goal was not reached" not in page.text


def test_the_search_in_the_provenance_is_drawn():
    provenance = dataclasses.replace(perta_provenance(), calibration=calibration())
    page = read(dataclasses.replace(BARE, provenance=provenance.to_dict()))
    assert page.one("section", id="strength").all("figure")


@pytest.mark.parametrize(
    ("name", "block", "module"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "model.layers:self_attn.q_proj"),
        ("transformer.h.11.attn.c_proj", 11, "transformer.h:attn.c_proj"),
        ("model.layers.2.mlp.experts.7.down_proj", 2, "model.layers:mlp.experts.down_proj"),
        ("model.layers.2.mlp.experts.down_proj[5]", 2, "model.layers:mlp.experts.down_proj"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_the_position_of_a_layer(name, block, module):
    position = position_of(name)
    assert (position.block, position.module) == (block, module)


def maps_of(layers):
    page = read(complete(provenance=perta_provenance(layers).to_dict())).one("section", id="layers")
    return page, {table.one("caption").text: table for table in page.all("table", class_="map")}


def test_a_map_holds_every_layer_at_its_position():
    layers = blocks(3, energy=lambda block: 0.9 + block / 100)
    page, maps = maps_of([*layers, layer("lm_head", 0.25, 0.5)])
    assert list(maps) == ["Mean weight on A", "Mean weight on B", "Energy of the edit kept"]
    values = {
        "Mean weight on A": lambda layer: layer.weights["A"].mean,
        "Energy of the edit kept": lambda layer: layer.energy_kept,
    }
    for title, value in values.items():
        header = [cell.text for cell in cells_of(maps[title].one("thead").all("tr")[0])]
        assert header == ["", "q_proj", "up_proj", "lm_head"]
        rows = maps[title].one("tbody").all("tr")
        assert [cells_of(row)[0].text for row in rows] == ["0", "1", "2", "others"]
        for edited, (row, column) in zip(layers, itertools.product(range(3), (1, 2)), strict=True):
            cell = cells_of(rows[row])[column]
            assert float(cell.one("data").attributes["value"]) == value(edited)
            assert cell.attributes["class"] == f"h{shade_of(value(edited))}"
        assert cells_of(rows[3])[1].text == "not edited"
    assert "in every layer" not in page.text


def test_a_value_that_all_layers_share_is_one_sentence():
    page, maps = maps_of(blocks(4))
    assert "Energy of the edit kept" not in maps
    assert "Energy of the edit kept: 1 in every layer" in page.text


@pytest.mark.parametrize("count", [MAX_ROWS, MAX_ROWS + 1, 128])
def test_a_deep_model_has_several_blocks_per_row(count):
    layers = blocks(count)
    _, maps = maps_of(layers)
    rows = maps["Mean weight on A"].one("tbody").all("tr")
    assert len(rows) <= MAX_ROWS
    size = math.ceil(count / MAX_ROWS)
    shown_blocks = []
    for row in rows:
        first, _, last = cells_of(row)[0].text.partition("\u2013")
        numbers = range(int(first), int(last or first) + 1)
        shown_blocks += numbers
        means = [edited.weights["A"].mean for edited in layers if position_of(edited.name).block in numbers]
        assert float(cells_of(row)[1].one("data").attributes["value"]) == pytest.approx(sum(means) / len(means))
        assert len(numbers) <= size
    assert shown_blocks == list(range(count))


@pytest.mark.parametrize(
    "layers",
    [
        blocks(72, modules=[f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]),
        [layer(f"model.layers.{b}.mlp.experts.{e}.up_proj", e / 64) for b in range(48) for e in range(64)],
    ],
    ids=["500 layers", "3000 experts"],
)
def test_a_large_model_and_long_answers_stay_small(layers, tmp_path):
    row = dict.fromkeys(("prompt", "expected", *MODELS), "&" * 100_000)
    provenance = perta_provenance(layers).to_dict()
    write_html_report(
        complete(provenance=provenance, generations={"forget": [row] * 50, "retain": [row] * 50}),
        tmp_path / "page.html",
    )
    assert os.path.getsize(tmp_path / "page.html") < 2**20


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """Reference: WCAG 2.2, 1.4.3."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast_in_both_schemes(scheme):
    light, _, dark = STYLE.read_text().partition("@media screen and (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark.partition("\n}")[0]))
    for ground, name in itertools.product(
        ("paper", "panel"),
        ("ink", "muted", *MODELS, "good", "mixed", "bad", "unknown", "ring"),
    ):
        assert contrast(colours[ground], colours[name]) >= 4.5, (ground, name)
    assert contrast(colours["mark"], colours["mark-ink"]) >= 4.5
    shades = [colours[f"h{step}"] for step in range(SHADES)]
    assert f"h{SHADES}" not in colours
    for step, ground in enumerate(shades):
        assert contrast(ground, colours[f"h{step}-ink"]) >= 4.5, step
    order = [luminance(ground) for ground in shades]
    assert order == sorted(order, reverse=scheme == "light")


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        write_html_report(complete(), tmp_path / name / "page.html")
    assert (tmp_path / "one" / "page.html").read_bytes() == (tmp_path / "other" / "page.html").read_bytes()


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_html_report(BARE, path)
    old = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputError, match="No space left on device; nothing was changed"):
        write_html_report(complete(), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_directory_is_no_page(tmp_path):
    with pytest.raises(OutputError, match="could not be written"):
        write_html_report(BARE, tmp_path)


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"layers": []}, "the provenance in the report data is damaged .*expected what PerTAProvenance.to_dict"),
        ({"fused": {"rank": 1}}, "the provenance in the report data is damaged"),
        (
            {**perta_provenance().to_dict(), "calibration": {"points": []}},
            "the provenance in the report data is damaged .*calibration.goal: field required",
        ),
    ],
)
def test_a_damaged_provenance_is_refused_before_anything_is_written(provenance, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write_html_report(complete(provenance=provenance), tmp_path / "page.html")
    assert not os.listdir(tmp_path)
