"""The page of measurements says what the files say."""

from pathlib import Path

from loadtests.pages import page, read

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "measurements"


def test_the_committed_page_is_made_from_the_committed_files() -> None:
    files = read(FOLDER)
    assert files, "no measurement is committed"
    assert (FOLDER / "README.md").read_text() == page(files)


def test_a_row_without_a_value_says_why() -> None:
    row = {
        "bench": "serve",
        "case": "single/llama_cpp",
        "metric": "throughput_ratio",
        "unit": "ratio",
        "value": None,
        "baseline": None,
        "ratio": None,
        "machine": "a machine",
        "commit": "abc",
        "reason": "no llama-server named",
    }
    text = page({"x.json": [row]})
    assert "| single/llama_cpp | throughput_ratio | – | ratio | – | – | no llama-server named |" in text
    assert "a machine; commit abc" in text
    sampled = row | {"value": 2.0, "num_samples": 3, "reason": ""}
    assert "| – | – | n = 3 |" in page({"x.json": [sampled]})
    assert "| – | – | n = 3; of two |" in page({"x.json": [sampled | {"note": "of two"}]})
