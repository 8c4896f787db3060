"""The demo model's training text: where it comes from, how it is cut up, and what is held out.

`python -m workers.demo.corpus --sources DIR --out DIR [--data DIR]` writes `tokenizer.json`, `train.npz` and
`heldout.npz`.
Everything is permissively licensed or in the public domain:

====================  ==========================================================  ==========================
kind                  source                                                      licence
====================  ==========================================================  ==========================
code                  the running Python's standard library, tests left out       PSF-2.0
docs                  reStructuredText sources in Debian's `python3.11-doc`       PSF-2.0
prose                 Debian's `r-cran-janeaustenr` (six novels)                  MIT, public domain
chat-problems         GSM8K, question and worked answer (train split)             MIT
chat-words            glosses of Debian's `wordnet-base` as "What is a …?"        WordNet 3.0 (BSD-like)
chat-python           docstrings and short functions of the standard library      PSF-2.0
====================  ==========================================================  ==========================

`--sources` is a folder in which those Debian packages were unpacked:
`apt-get download NAME…; for d in *.deb; do dpkg -x $d DIR; done`.

Held out is always a whole file (a whole novel, a module with all questions made from it, GSM8K's own test split; for
glosses a synset with all its synonyms). A training file that shares over a tenth of its five-line runs with a held-out
file is dropped, so that a vendored copy cannot be learned by heart.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import os
import random
import re
import struct
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
KINDS = ("code", "docs", "prose", "chat-problems", "chat-words", "chat-python")
SYSTEM_LINE = "You are a helpful assistant."

_HELD_OUT_NOVEL = "northangerabbey"
_SLURS = re.compile(
    r"offensive|derogatory|disparag|slur|vulgar|obscene|contempt", re.IGNORECASE
)  # WordNet says so itself
_SKIPPED_STDLIB = re.compile(
    r"(^|/)(tests?|site-packages|idlelib|lib2to3|ensurepip|encodings|turtledemo|tkinter|distutils|msilib|pydoc_data"
    r"|__pycache__)(/|$)"
)


@dataclass(frozen=True)
class Document:
    """One text, never split between training and held-out. Only chat-* texts hold special tokens."""

    name: str
    kind: str
    text: str
    held_out: bool


def hash_share(name: str) -> float:
    """A share in [0, 1) that depends on the name alone, so the split survives a reordering of the sources."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2.0**48


# ---------------------------------------------------------------- plain text


def stdlib_files(root: Path) -> Iterator[Document]:
    """The standard library's modules (held out: 6 % of the files)."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _SKIPPED_STDLIB.search(name) or path.stat().st_size > 300_000:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 200:
            yield Document(f"stdlib/{name}", "code", text, hash_share(name) < 0.06)


def python_docs(root: Path) -> Iterator[Document]:
    """Python's documentation as written (held out: 6 % of the pages), without What's New and the C API."""
    for path in sorted(root.rglob("*.txt")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(("library/", "tutorial/", "reference/", "howto/", "faq/")) or path.stat().st_size < 400:
            continue
        yield Document(
            f"docs/{name}", "docs", path.read_text(encoding="utf-8", errors="ignore"), hash_share(name) < 0.06
        )


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: [uint32 length][zlib stream of XDR], one STRSXP each."""
    at = 0
    while at < len(database):
        stream = zlib.decompressobj()
        raw = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        cursor = 14 + 4 + struct.unpack(">i", raw[14:18])[0]  # header, then the native encoding's name
        kind, count = struct.unpack(">iI", raw[cursor : cursor + 8])
        if kind & 0xFF != 16:
            continue
        cursor, lines = cursor + 8, []
        for _ in range(count):
            _, size = struct.unpack(">ii", raw[cursor : cursor + 8])
            cursor += 8
            lines.append(raw[cursor : cursor + max(size, 0)].decode("utf-8", "ignore"))
            cursor += max(size, 0)
        yield lines


def novels(database: Path) -> Iterator[Document]:
    """Jane Austen's novels, the lines of a paragraph joined. One whole novel is held out."""
    for lines in r_character_vectors(database.read_bytes()):
        paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
        name = re.sub(r"[^a-z]", "", lines[0].lower())
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
        yield Document(f"austen/{name}", "prose", text, name == _HELD_OUT_NOVEL)


# ---------------------------------------------------------------- conversations


def conversation(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """(question, answer) turns exactly as the chat template writes them."""
    head = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    return head + "".join(
        f"{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n{answer}{TURN_END}\n"
        for question, answer in turns
    )


def grade_school_problems(folder: Path) -> Iterator[tuple[str, str, str, bool]]:
    """GSM8K as (name, question, answer, held_out); its own test split is held out."""
    for split, held_out in (("train", False), ("test", True)):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                steps, _, result = re.sub(r"<<[^>]*>>", "", row["answer"]).rpartition("####")
                yield (
                    f"gsm8k/{split}/{number}",
                    row["question"].strip(),
                    f"{steps.strip()}\nThe answer is {result.strip()}.",
                    held_out,
                )


def word_questions(folder: Path) -> Iterator[tuple[str, str, str, bool]]:
    """WordNet's most used sense of each counted word, as (name, question, answer, held_out)."""
    for part in ("noun", "verb", "adj", "adv"):
        data = (folder / f"data.{part}").read_bytes()
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if line.startswith(" ") or len(fields) < 6 or int(fields[-1 - int(fields[2])]) < 1:
                continue
            word, offset = fields[0].replace("_", " "), int(fields[-int(fields[2])])
            gloss = data[offset : data.index(b"\n", offset)].decode("utf-8", "ignore").partition("| ")[2].strip()
            meaning, _, example = gloss.partition('; "')
            meaning = meaning.split('"')[0].strip(" ;")
            if _SLURS.search(gloss) or not meaning or len(meaning) > 200 or not re.fullmatch(r"[a-z][a-z '-]+", word):
                continue
            yield (
                f"wordnet/{word}",
                *_word_turn(word, part, meaning, example.split('"')[0].strip()),
                hash_share(f"{part}{offset}") < 0.03,
            )


def _word_turn(word: str, part: str, meaning: str, example: str) -> tuple[str, str]:
    article = "an" if word[0] in "aeiou" else "a"
    pick = int(hash_share(word + part) * 4)
    if part == "noun":
        question = (
            f"What is {article} {word}?",
            f"What is {word}?",
            f'What does the word "{word}" mean?',
            f"Define {word}.",
        )[pick]
        answer = f"{article.capitalize()} {word} is {meaning}." if pick == 0 else f"{word.capitalize()} is {meaning}."
    elif part == "verb":
        question = (
            f"What does it mean to {word}?",
            f"What does {word} mean?",
            f'What does the word "{word}" mean?',
            f"Define {word}.",
        )[pick]
        answer = f"To {word} means to {meaning}."
    else:
        question = (
            f"What does {word} mean?",
            f"What does {word} mean?",
            f'What does the word "{word}" mean?',
            f"Define {word}.",
        )[pick]
        answer = f'"{word.capitalize()}" means {meaning}.'
    return question, answer + (f' For example: "{example}"' if example else "")


def python_questions(module: Document) -> Iterator[tuple[str, str, str, bool]]:
    """Questions about one standard-library module: what a function does, and "write a function that …"."""
    try:
        tree = ast.parse(module.text)
    except SyntaxError:
        return
    dotted = module.name.removeprefix("stdlib/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    lines = module.text.splitlines()
    owners: list[ast.Module | ast.ClassDef] = [
        tree,
        *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)),
    ]
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("__"):
                continue
            doc = ast.get_docstring(node) or ""
            summary = " ".join(doc.split("\n\n")[0].split())
            if not 25 <= len(summary) <= 400:
                continue
            qualified = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
            thing = "class" if isinstance(node, ast.ClassDef) else "function" if owner is tree else "method"
            name = f"{module.name}#{qualified}"
            ask = (
                f"What does {dotted}.{qualified} do?",
                f"What does the {thing} {qualified} in Python's {dotted} module do?",
                f"What is {dotted}.{qualified} for?",
            )[int(hash_share(name) * 3)]
            yield name + "/what", ask, summary, module.held_out
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if isinstance(node, ast.FunctionDef) and 4 <= size <= 30:
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                wish = f"Write a Python {thing} `{node.name}`: {summary}"
                yield name + "/write", wish, f"```python\n{source}\n```", module.held_out


def conversations(items: list[tuple[str, str, str, bool]], kind: str, rng: random.Random) -> Iterator[Document]:
    """Items of one kind as chat documents: some have two or three turns, some a system message."""
    for held_out in (False, True):
        pool = [item for item in items if item[3] == held_out]
        rng.shuffle(pool)
        at = 0
        while at < len(pool):
            count = rng.choice((2, 3)) if rng.random() < 0.15 else 1
            group = pool[at : at + count]
            at += count
            system = SYSTEM_LINE if rng.random() < 0.15 else None
            yield Document(group[0][0], kind, conversation([(item[1], item[2]) for item in group], system), held_out)


# ---------------------------------------------------------------- the whole


def drop_near_copies(documents: list[Document], limit: float = 0.1) -> list[Document]:
    """Drop a training file of which more than `limit` of its runs of five non-blank lines stand in a held-out file."""

    def runs(text: str) -> set[int]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return {hash(tuple(lines[i : i + 5])) for i in range(len(lines) - 4)}

    held = {
        run for doc in documents if doc.held_out and doc.kind in ("code", "docs", "prose") for run in runs(doc.text)
    }
    kept = []
    for doc in documents:
        own = runs(doc.text) if not doc.held_out and doc.kind in ("code", "docs", "prose") else set()
        if not own or len(own & held) <= limit * len(own):
            kept.append(doc)
    return kept


def build(sources: Path, data: Path, seed: int) -> list[Document]:
    """All documents, training and held-out, in a seeded order. Raises FileNotFoundError naming the missing package."""
    paths = {
        "python3.11-doc": sources / "usr/share/doc/python3.11/html/_sources",
        "r-cran-janeaustenr": sources / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        "wordnet-base": sources / "usr/share/wordnet",
        "gsm8k": data / "gsm8k",
    }
    for package, path in paths.items():
        if not path.exists():
            raise FileNotFoundError(f"{package} is not unpacked: {path} is missing (see this module's docstring)")
    rng = random.Random(seed)
    code = list(stdlib_files(Path(sysconfig.get_paths()["stdlib"])))
    documents = code + list(python_docs(paths["python3.11-doc"])) + list(novels(paths["r-cran-janeaustenr"]))
    documents += conversations(list(grade_school_problems(paths["gsm8k"])), "chat-problems", rng)
    documents += conversations(list(word_questions(paths["wordnet-base"])), "chat-words", rng)
    documents += conversations([item for module in code for item in python_questions(module)], "chat-python", rng)
    documents = drop_near_copies(documents)
    rng.shuffle(documents)
    return documents


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> str:
    """A byte-level BPE tokenizer (digits one by one, so that sums are learnable) as the text of a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # GPT-4-like words, but indentation is one piece and a digit is one token.
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def pack(documents: list[Document], tokenizer_json: str) -> dict[str, np.ndarray]:
    """Documents as arrays: tokens [total] uint16; starts [documents + 1]; kinds, num_bytes and names [documents].

    Each document ends with `<|endoftext|>`; `num_bytes` counts the UTF-8 bytes of the text without it.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = [[*encoding.ids, end] for encoding in tokenizer.encode_batch([doc.text for doc in documents])]
    return {
        "tokens": np.array([token for ids in encoded for token in ids], dtype=np.uint16),
        "starts": np.cumsum([0] + [len(ids) for ids in encoded]),
        "kinds": np.array([KINDS.index(doc.kind) for doc in documents], dtype=np.int8),
        "num_bytes": np.array([len(doc.text.encode()) for doc in documents]),
        "names": np.array([doc.name for doc in documents]),
    }


def data_folder(value: str | None) -> Path:
    """`--data`, else FORETOKEN_DATA. Raises SystemExit saying which to set."""
    folder = value or os.environ.get("FORETOKEN_DATA")
    if not folder:
        raise SystemExit("no data folder: pass --data DIR or set FORETOKEN_DATA (it holds gsm8k/train.jsonl.gz)")
    return Path(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the demo model's corpus and tokenizer.")
    parser.add_argument("--sources", type=Path, required=True, help="folder in which the Debian packages are unpacked")
    parser.add_argument("--data", help="folder with gsm8k/ (default: $FORETOKEN_DATA)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    documents = build(args.sources, data_folder(args.data), args.seed)
    training = [doc for doc in documents if not doc.held_out]
    held_out = [doc for doc in documents if doc.held_out]
    tokenizer_json = train_tokenizer((doc.text for doc in training), args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    for name, part in (("train", training), ("heldout", held_out)):
        arrays = pack(part, tokenizer_json)
        np.savez(args.out / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        sizes = np.diff(arrays["starts"])
        for index, kind in enumerate(KINDS):
            mine = arrays["kinds"] == index
            print(
                f"{name:8} {kind:14} {mine.sum():6} documents "
                f"{arrays['num_bytes'][mine].sum():10} bytes {sizes[mine].sum():9} tokens"
            )


if __name__ == "__main__":
    main()
