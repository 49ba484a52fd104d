import pytest

from nomic_jax.files.printable import code, html, markdown, printable


def test_terminals():
    assert printable("\x1b]0;title\x07\r\nred\u2028\u202e\x9b\ud800") == (
        "\\x1b]0;title\\x07\\r\\nred\\u2028\\u202e\\x9b\\ud800"
    )
    assert printable("naïve 漢字 नम\u200dस्ते \\n") == "naïve 漢字 नम\u200dस्ते \\n"
    assert printable("a\nb", keep="\n") == "a\nb"
    assert printable(None) == "None"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("learning_rate", "learning_rate"),
        ("_a_ **b** `c` ~d~ $e$", "\\_a\\_ \\*\\*b\\*\\* \\`c\\` \\~d\\~ \\$e\\$"),
        ("a|b\n# c", "a\\|b\\n# c".replace("\\n", "\\\\n").replace("#", "\\#")),
        ("<script>&amp;", "&lt;script&gt;&amp;amp;"),
        ("![x](http://y)", "\\!\\[x\\](http://y)"),
        ("- a", "\\- a"),
        ("1. a", "1\\. a"),
        ("2024-01-01", "2024-01-01"),
        ("0.5", "0.5"),
        ("-0.5", "-0.5"),
        ("---", "\\---"),
    ],
)
def test_markdown(text, shown):
    assert markdown(text) == shown


def test_code_and_html():
    assert code("a|b\n") == "`a\\|b\\n`"
    assert code("a``b`") == "``` a``b` ```"
    assert html('<a href="\'">\n') == "&lt;a href=&quot;&#x27;&quot;&gt;\\n"
