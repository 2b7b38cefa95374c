"""Every command that writes: not over its inputs, not into others' folders, again over its own."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.errors import ModelError, RecipeError
from tercet.files.outputs import MARK, check_output, mark
from tercet.models.embedder import Embedder
from tercet.studies import demo
from tercet.training.plan import RUN
from tests.cli.lines import write
from tests.toy import SENTENCES

STUDY = '''
from pathlib import Path
from typing import Annotated

from tercet.data.files.sources import Source
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import open_set
from tercet.studies.cells import Cell, Study


def study(
    data: Annotated[list[Source], "Pairs."],
    test: Annotated[Path, "A set."],
    model: Annotated[Path, "A folder."],
) -> Study:
    """Measure one model."""
    cells = [Cell("as it is", model)]
    return Study(cells=cells, sets=[open_set(test)], report=lambda found: [], data={"pairs": data})
'''


class Writes(NamedTuple):
    """A command, where {h} is the folder of its inputs, and what it reads."""

    words: str
    reads: tuple[str, ...]
    out: str = "out"  # a name for its output
    again: bool = True  # over its own output


MINE = "mine {h}/pairs.jsonl --by bm25 --negatives 1 --depth 5 --at-least 0 --work {h}/../work "
MAKE = "--task t --instruction i --out {out}"
SMALL = "--model {h}/model --set batch_size=8 --steps 2 --device cpu"

FILES = {
    "check --json": Writes(
        "check {h}/pairs.jsonl --test-data {h}/test.jsonl --model {h}/model --json {out}",
        ("pairs.jsonl", "test.jsonl", "model/config.json"),
    ),
    "check --plot": Writes("check {h}/sources --plot {out}", ("sources/de.jsonl",), "out.png"),
    "eval --json": Writes(
        "eval {h}/test.jsonl --model {h}/model --no-bm25 --json {out}",
        ("test.jsonl", "model/config.json"),
    ),
    "eval of sets --json": Writes(
        "eval {h}/sources --model {h}/model --no-bm25 --json {out}", ("sources/de.jsonl",)
    ),
    "eval --compressed --json": Writes(
        "eval {h}/test.jsonl --model {h}/model --compressed --json {out}",
        ("test.jsonl", "model/tercet.json"),
    ),
    "encode": Writes(
        "encode {h}/texts.txt --model {h}/model --out {out}", ("texts.txt",), "out.npy"
    ),
    "encode --per": Writes(
        "encode {h}/texts.txt --model {h}/model --per word --out {out}", ("texts.txt",), "out.npz"
    ),
    "encode --format": Writes(
        "encode {h}/docs.jsonl --model {h}/model --format qdrant --out {out}",
        ("docs.jsonl", "model/modules.json"),
    ),
    "mine": Writes(
        MINE + "--corpus {h}/docs.jsonl --out {out}", ("pairs.jsonl", "docs.jsonl"), "out.jsonl"
    ),
    "score": Writes(
        "score {h}/pairs.jsonl --model {h}/model --device cpu --work {h}/../work --out {out}",
        ("pairs.jsonl",),
        "out.jsonl",
    ),
    "synthesize": Writes(
        "synthesize {h}/docs.jsonl --model {h}/model --out {out}",
        ("docs.jsonl",),
        again=False,  # see tests/cli/test_synthesize.py
    ),
    "convert labels": Writes(
        "convert labels {h}/labelled.jsonl --test-data {h}/test.jsonl " + MAKE,
        ("labelled.jsonl", "test.jsonl"),
        "out.jsonl",
    ),
    "convert labels, parquet": Writes(
        "convert labels {h}/labelled.jsonl " + MAKE, ("labelled.jsonl",), "out.parquet"
    ),
    "convert scores": Writes(
        "convert scores {h}/scored.jsonl --alike 1 " + MAKE, ("scored.jsonl",), "out.jsonl"
    ),
    "convert flagembedding": Writes(
        "convert flagembedding {h}/flag --out {out}", ("flag/sts.jsonl",), "out.jsonl"
    ),
    "convert arctic": Writes(
        "convert arctic {h}/tables --mined {h}/tables/mined.parquet --work {h}/../work --out {out}",
        ("tables/queries.parquet", "tables/mined.parquet"),
        "out.jsonl",
    ),
    "decontaminate": Writes(
        "decontaminate {h}/pairs.jsonl --test-data {h}/test.jsonl --out {out}",
        ("pairs.jsonl", "test.jsonl"),
        "out.jsonl",
    ),
}
FOLDERS = {
    "convert arctic of rows": Writes(
        "convert arctic {h}/pairs.jsonl --out {out}", ("", "pairs.jsonl")
    ),
    "encode --kind": Writes(
        "encode {h}/texts.txt --model {h}/model --kind dense --out {out}",
        ("", "texts.txt", "model"),
    ),
    "encode of several": Writes(
        "encode {h}/texts.txt {h}/docs.jsonl --model {h}/model --out {out}", ("", "model")
    ),
    "mine of several": Writes(
        MINE.replace("pairs.jsonl", "sources") + "--out {out}", ("", "sources")
    ),
    "decontaminate of several": Writes(
        "decontaminate {h}/sources --test-data {h}/test.jsonl --out {out}", ("", "sources")
    ),
    "filter": Writes(
        "filter {h}/pairs.jsonl --model {h}/model --work {h}/../work --out {out}",
        ("", "model", "pairs.jsonl"),
    ),
    "index": Writes(
        "index {h}/docs.jsonl --model {h}/model --out {out}", ("", "model", "docs.jsonl")
    ),
    "index --fresh": Writes(
        "index {h}/docs.jsonl --model {h}/model --fresh --out {out}", ("", "model", "docs.jsonl")
    ),
    "train": Writes(
        "train finetune --data {h}/pairs.jsonl " + SMALL + " --out {out}", ("", "model")
    ),
    "diagnose": Writes(
        "diagnose {h}/texts.txt --model {h}/model --triples {h}/triples.jsonl --out {out}",
        ("", "model"),
    ),
    "demo": Writes("demo --packages {h}/packages.parquet --steps 2 --out {out}", ("",)),
    "study": Writes(
        "study {h}/study.py --data {h}/pairs.jsonl --test {h}/test.jsonl --model {h}/model "
        "--device cpu --out {out}",
        ("", "model"),
    ),
    "eval of sets --out": Writes(
        "eval {h}/sources --model {h}/model --no-bm25 --out {out}", ("", "model", "sources")
    ),
    "merge": Writes("merge {h}/adapter --model {h}/model --out {out}", ("", "model", "adapter")),
    "retokenize": Writes("retokenize {h}/model --tokenizer {h}/model --out {out}", ("", "model")),
    "quantize": Writes(
        "quantize {h}/model --data {h}/many.txt --min-cosine 0 --out {out}",
        ("", "model", "many.txt"),
    ),
}
NEVER_AGAIN = ("merge", "retokenize", "quantize")  # they replace nothing that is there
LONG = ("demo", "diagnose")
UNKNOWN = ("mine of several", "decontaminate of several")  # rows are like anybody's
FOREIGN = ("letter.txt", "config.json", "index.json", "dense.npy", "model/config.json", "log.jsonl")


@pytest.fixture(scope="session")
def home(tmp_path_factory, encoder_folder):
    """Inputs of every command."""
    home = tmp_path_factory.mktemp("home") / "home"
    pairs = [{"query": f"{s} {i}?", "positives": [f"{s} {i}"]} for i in range(2) for s in SENTENCES]
    home.mkdir()
    write(home / "pairs.jsonl", *pairs)
    other = [" ".join(reversed(s.split())) for s in SENTENCES]  # nearly the same as no other text
    write(home / "test.jsonl", *({"query": s, "positives": [f"{s}, yes"]} for s in other))
    write(home / "docs.jsonl", *({"id": s, "text": s} for s in SENTENCES))
    (home / "texts.txt").write_text("\n".join(SENTENCES) + "\n")
    (home / "many.txt").write_text("\n".join(2 * SENTENCES) + "\n")
    labels = [{"text": f"a {s}", "label": str(n % 2)} for n, s in enumerate(SENTENCES)]
    write(home / "labelled.jsonl", *labels)
    scored = [
        {"text1": f"{s} one", "text2": f"{s} two", "score": n % 5} for n, s in enumerate(SENTENCES)
    ]
    write(home / "scored.jsonl", *scored)
    for folder in ("sources", "flag", "tables"):
        (home / folder).mkdir()
    for lang in ("de", "fr"):
        write(home / f"sources/{lang}.jsonl", *pairs)
    flag = [{"query": s, "pos": [f"{s}!"], "neg": ["other"]} for s in SENTENCES]
    write(home / "flag/sts.jsonl", *flag)
    rest = {"query": " in a file", "positive": " in a map", "negative": " of the moon"}
    write(home / "triples.jsonl", *({"prefix": s, **rest} for s in SENTENCES[:4]))
    packages = [
        {"id": f"{i}{split}{s}", "short": f"{s} {i}", "long": f"{s} of {i}", "section": "web"}
        | {"split": split}
        for split in ("train", "dev", "test")
        for i in range(4)
        for s in SENTENCES
    ]
    pq.write_table(pa.Table.from_pylist(packages), home / "packages.parquet")
    (home / "study.py").write_text(STUDY)
    embedder = Embedder.load(encoder_folder)
    embedder.save(home / "model")
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    embedder.save_adapter(home / "adapter", str(home / "model"))
    from tercet.curate.convert.arctic import write_tables
    from tercet.data.files.sources import iter_examples

    write_tables(home / "tables", iter_examples(home / "pairs.jsonl"))
    return home


@pytest.fixture
def untouched():
    """Return the content of all files in a folder."""
    return lambda folder: {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def idle(monkeypatch):
    """Fail where a model is loaded."""

    def load(*_, **__):
        raise AssertionError("no work is due")

    monkeypatch.setattr(Embedder, "load", load)


def filled(command: Writes, home: Path, out: Path) -> list[str]:
    return [word.format(h=home, out=out) for word in command.words.split()]


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_an_output_that_is_an_input_is_refused_before_any_work(
    name, refused, home, tmp_path, untouched, idle
):
    command = (FILES | FOLDERS)[name]
    own = tmp_path / "home"
    shutil.copytree(home, own)
    before = untouched(own)
    for read in command.reads:
        for out in (own / read, tmp_path / "home/sources/.." / read):
            said = refused(*filled(command, own, out))
            expected = ("input", "would be overwritten", "exists already", "a file is where")
            assert any(part in said for part in expected), said
            assert untouched(own) == before
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_others_is_refused_before_any_work(
    name, refused, home, tmp_path, untouched, idle
):
    for path in FOREIGN:
        out = tmp_path / "out"
        (out / path).parent.mkdir(parents=True)
        (out / path).write_text("{}")
        before = untouched(out)
        said = refused(*filled(FOLDERS[name], home, out))
        assert "is not a" in said or "exists already" in said or "cannot be used" in said, said
        assert untouched(out) == before
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, each in (FILES | FOLDERS).items()
        if each.again
    ],
)
def test_an_output_is_written_again_over_its_own(
    name, tercet, home, tmp_path, untouched, monkeypatch
):
    command = (FILES | FOLDERS)[name]
    monkeypatch.setattr(demo, "BASE", str(home / "model"))
    words = filled(command, home, tmp_path / command.out)
    before = untouched(home)
    ended = tercet(*words)
    assert ended.status == 0, ended.err
    again = tercet(*words)
    if name in NEVER_AGAIN:
        assert again.status == 2 and "exists already" in again.err
        return
    assert again.status == 0, again.err
    for marker in (tmp_path / command.out).rglob(MARK):  # as an earlier version left it
        marker.unlink()
    once_more = tercet(*words)
    assert once_more.status == (2 if name in UNKNOWN else 0), once_more.err
    assert untouched(home) == before


@pytest.mark.parametrize("path", ["model/config.json", "model/notes.txt", "steps/1/config.json"])
def test_a_run_does_not_replace_a_model_that_it_did_not_make(
    refused, home, tmp_path, untouched, idle, path
):
    out = tmp_path / "out"
    mark(out, RUN)
    (out / path).parent.mkdir(parents=True)
    (out / path).write_text("{}")
    before = untouched(out)
    words = filled(FOLDERS["train"], home, out)
    said = refused(*words, "--set", "run.models_at=1")
    assert said.startswith(f"{(out / path).parent}: is not a model and would be overwritten")
    assert untouched(out) == before


@pytest.mark.parametrize("read", ["log.jsonl", "model/pairs.jsonl", "1-mntp/log.jsonl"])
@pytest.mark.parametrize("flag", ["--data", "--dev"])
def test_a_run_does_not_read_what_it_will_replace(refused, home, tmp_path, untouched, read, flag):
    out = tmp_path / "out"
    mark(out, RUN)
    (out / read).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(home / "pairs.jsonl", out / read)
    before = untouched(out)
    words = filled(FOLDERS["train"], home, out)
    said = refused(*words, flag, out / read)
    assert said == f"{out}: is or contains the input {out / read}; give another --out"
    assert untouched(out) == before
    shutil.copy(home / "pairs.jsonl", out / "pairs.jsonl")  # it stays as it is
    check_output(out, [out / "pairs.jsonl"], RUN)


def test_a_model_is_saved_over_a_model_of_tercet_alone(home, tmp_path, untouched):
    embedder = Embedder.load(home / "model")
    stock = tmp_path / "stock"  # as another library saves it
    shutil.copytree(home / "model", stock)
    for name in ("tercet.json", MARK):
        (stock / name).unlink()
    noted = tmp_path / "noted"
    shutil.copytree(home / "model", noted)
    (noted / "notes.txt").write_text("worth a year")
    for folder, said in ((stock, "is not a model"), (noted, "holds notes.txt, which tercet did")):
        before = untouched(folder)
        with pytest.raises(ModelError, match=said):
            embedder.save(folder)
        assert untouched(folder) == before
    (noted / MARK).unlink()  # as if an earlier version had made the model
    with pytest.raises(ModelError, match="is not a model and would be overwritten"):
        embedder.save(noted)
    (noted / "notes.txt").unlink()
    (noted / "mine").mkdir()
    (noted / "mine/config.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a model and would be overwritten"):
        embedder.save(noted)
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    before = untouched(tmp_path)
    for folder in (stock, noted, home / "sources"):
        with pytest.raises(ModelError, match="is not a model and would be overwritten"):
            embedder.save_adapter(folder, str(home / "model"))
    with pytest.raises(RecipeError, match="is an input; give another folder"):
        embedder.save_adapter(home / "model", str(home / "model"))
    assert untouched(tmp_path) == before


def test_every_command_that_writes_is_in_the_table():
    from tercet.cli.app import COMMANDS

    silent = {"search", "serve", "list-models", "inspect", "probe"}
    in_place = {"tune"}  # with --save, into the settings of their model
    table = {words.partition(" ")[0] for words in FILES | FOLDERS}
    assert table | silent | in_place == set(COMMANDS)
