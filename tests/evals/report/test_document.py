"""Both formats of a report show the same texts, and nothing in them becomes markup."""

import base64
from html.parser import HTMLParser

from nomic_jax.evals.report.document import Details, Heading, Paragraph, Picture, Table, write_document

HOSTILE = 'a\n# b <img src=http://x onerror=y> | ![c](http://d) " `e` \x1b[31m</script></pre>'
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of the head."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "head" not in self.open:
            self.text.append(data.strip())


def test_one_page_with_all_of_it(tmp_path):
    (tmp_path / "p.png").write_bytes(PNG)
    write_document(
        tmp_path,
        [
            Heading("Report", 1),
            Heading("Scores & more"),
            Table(["name", "nDCG@10"], [["x", 0.5], ["y", 2e-5], ["z", "12.5%"]]),
            Picture("p.png", "a picture"),
            Details("configuration", '{\n "a": "```"\n}'),
        ],
    )
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    tags = dict(page.tags)
    assert base64.b64decode(tags["img"]["src"].removeprefix("data:image/png;base64,")) == PNG
    assert tags["img"]["alt"] == "a picture" and tags["html"] == {"lang": "en"}
    # Nothing is loaded from elsewhere, and links stay on the page.
    assert [x for _, attributes in page.tags for name, x in attributes.items() if name == "href"] == ["#scores-more"]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [x["class"] for tag, x in page.tags if tag == "td" and x] == ["number"] * 3
    assert {"0.500", "2e-05", "12.5%"} <= set(page.text)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| x | 0.500 |" in text and "![a picture](p.png)" in text and "````json\n{\n" in text


def test_names_are_no_markup(tmp_path):
    parts = [Heading(HOSTILE, 1), Heading(HOSTILE), Paragraph(HOSTILE), Table([HOSTILE], [[HOSTILE]])]
    write_document(tmp_path, [*parts, Details(HOSTILE, HOSTILE)])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and not {"img", "script"} & {tag for tag, _ in page.tags}
    assert sum("<img src=http://x onerror=y>" in text for text in page.text) == 8
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.splitlines())
