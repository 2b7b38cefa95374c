"""Search over HTTP: its answers are those of the index itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tercet.client import Client
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.search.engine.engine import ReciprocalRank, Rerank, Weighted
from tercet.search.text_index import TextIndex, open_index
from tests.serve.indexed import DOCUMENTS, found, make_index
from tests.serving import Running, load, serving

QUERIES = ["a music player", "files on a web server", "mountains"]
USUAL = Weights(1.0, 0.5, 2.0)  # which the model has


@pytest.fixture(scope="module")
def folders(hybrid_folder, encoder_folder, tmp_path_factory) -> dict[str, Path]:
    """Indexes of all kinds, of codes, of one kind each, and of a model of dense vectors."""
    made = tmp_path_factory.mktemp("indexes")
    found = {
        "all": make_index(made / "all", hybrid_folder),
        "codes": make_index(made / "codes", hybrid_folder, precision="int8", dims=16),
        "task": make_index(made / "task", hybrid_folder, task="clustering"),
        "plain": make_index(made / "plain", encoder_folder),
    }
    for kind in KINDS:
        found[kind] = make_index(made / kind, hybrid_folder, kinds=[kind])
    return found


@pytest.fixture(scope="module")
def server(folders) -> Iterator[Running]:
    with serving(indexes=folders) as running:
        yield running


@pytest.fixture(scope="module")
def opened(folders) -> Iterator[dict[str, TextIndex]]:
    indexes = {name: open_index(folder, load=load) for name, folder in folders.items()}
    yield indexes
    for each in indexes.values():
        each.close()


def same(answer, expected) -> None:
    """Check that an answer has these hits, with their scores to 1e-6, and all of their records."""
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [result["query"] for result in results] == QUERIES
    assert any(expected)
    for result, hits in zip(results, expected, strict=True):
        assert [hit["id"] for hit in result["hits"]] == [hit.record.id for hit in hits]
        for got, hit in zip(result["hits"], hits, strict=True):
            assert got["score"] == pytest.approx(hit.score, abs=1e-6)
            assert got["scores"] == pytest.approx(hit.scores, abs=1e-6)
            assert (got["title"], got["text"]) == (hit.record.title, hit.record.text)
            assert got["fields"] == hit.record.fields


@pytest.mark.parametrize("name", ["all", "codes", "task", "plain", *KINDS])
def test_search_over_http_is_search_in_the_index(server, opened, name):
    answer = server.post("/v1/search", {"index": name, "queries": QUERIES, "k": 4})
    same(answer, opened[name].search(QUERIES, 4))
    assert answer.json()["index"] == name


@pytest.mark.parametrize(
    "fields, fusion",
    [
        ({"weights": {"sparse": 3}}, Weighted(weights=Weights(1.0, 3.0, 2.0))),
        ({"weights": {"dense": 0, "multi": 0}}, Weighted(weights=Weights(0.0, 0.5, 0.0))),
        ({"candidates": 0}, Weighted(weights=USUAL, candidates=None)),
        ({"fusion": "rrf"}, ReciprocalRank()),
        ({"fusion": "rrf", "weights": {"dense": 0}}, ReciprocalRank(kinds=("sparse", "multi"))),
        ({"fusion": "rerank", "candidates": 3}, Rerank(weights=USUAL, candidates=3)),
    ],
    ids=str,
)
def test_weights_and_fusions_of_a_request_are_those_of_the_command(server, opened, fields, fusion):
    answer = server.post("/v1/search", {"index": "all", "queries": QUERIES, "k": 3, **fields})
    same(answer, opened["all"].search(QUERIES, 3, fusion=fusion))


@pytest.mark.parametrize(
    "where", [{"lang": "de"}, {"lang": ["de", "en"], "year": 2004}, {"year": [2001, 2003]}], ids=str
)
def test_conditions_hold_for_all_hits(server, opened, where):
    answer = server.post("/v1/search", {"index": "all", "queries": QUERIES, "where": where})
    same(answer, opened["all"].search(QUERIES, where=where))


def test_the_first_index_and_five_hits_are_meant_where_nothing_is_said(server, opened):
    answer = server.post("/v1/search", {"query": QUERIES[0]})
    assert answer.json()["index"] == "all"
    assert found(answer) == [[hit.record.id for hit in opened["all"].search(QUERIES[:1])[0]]]
    assert len(found(answer)[0]) == 5


def test_an_answer_says_how_many_tokens_were_read_and_what_was_cut(server):
    answer = server.post("/v1/search", {"queries": ["music", "music " * 40]}).json()
    assert [(each["tokens"], each["truncated"]) for each in answer["results"]] == [
        (8, False),
        (32, True),
    ]
    assert answer["ms"]["total"] >= answer["ms"]["encode"] > 0


def test_matching_tokens_are_shown_with_the_products_that_add_up_to_the_score(server):
    asked = {"query": "music and files", "k": 12, "highlight": True, "index": "sparse"}
    hits = server.post("/v1/search", asked).json()["results"][0]["hits"]
    assert hits
    for hit in hits:
        products = [match["product"] for match in hit["matches"]]
        assert sum(products) == pytest.approx(hit["scores"]["sparse"], abs=1e-5)
        assert products == sorted(products, reverse=True)
        for match in hit["matches"]:
            assert match["product"] == pytest.approx(match["query"] * match["document"])
            for begin, end in match["spans"]:
                assert hit["text"][begin:end] == match["token"].removeprefix("##")
    named = {match["token"] for hit in hits for match in hit["matches"]}
    assert {"music", "files", "and"} <= named


def test_an_index_without_sparse_vectors_says_why_no_token_is_shown(server):
    answer = server.post("/v1/search", {"index": "dense", "query": "music", "highlight": True})
    assert answer.json()["notes"] == [
        "highlight: the index has no sparse vectors, whose tokens could match"
    ]
    assert "matches" not in answer.json()["results"][0]["hits"][0]


def test_a_condition_that_nothing_fulfils_is_explained(server):
    where = {"language": "en", "lang": "dee"}
    answer = server.post("/v1/search", {"query": "music", "where": where}).json()
    assert answer["results"][0]["hits"] == []
    assert answer["notes"] == [
        "where language: no document has this field; there are: lang, year",
        "where lang=dee: no document has this value; there are: de",
    ]


@pytest.mark.parametrize(
    "fields, status, message",
    [
        ({"query": "a", "queries": ["b"]}, 400, 'give "queries" or "query", not both'),
        ({"queries": []}, 400, '"queries" must not be empty'),
        ({"queries": [7]}, 400, '"queries[0]" must be a string; got 7'),
        ({}, 400, '"queries" is missing; it must be a list of strings'),
        ({"query": " "}, 400, "a query is blank; say what to look for"),
        ({"query": "a", "k": 0}, 400, '"k" must be from 1 to 1000; got 0'),
        (
            {"query": "a", "weights": {"dense": -1}},
            400,
            '"weights.dense" must be a number from 0 to 1,000,000; got -1',
        ),
        (
            {"query": "a", "weights": {"dense": 1e39}, "candidates": 0},
            400,
            '"weights.dense" must be a number from 0 to 1,000,000; got 1e+39',
        ),
        (
            {"query": "a", "weights": {"sparse": 1e308}},
            400,
            '"weights.sparse" must be a number from 0 to 1,000,000; got 1e+308',
        ),
        (
            {"query": "a", "weights": {"x": 1}},
            400,
            '"weights" must be of the kinds dense, sparse, multi; got "x"',
        ),
        (
            {"query": "a", "weights": dict.fromkeys(KINDS, 0)},
            400,
            "all kinds have the weight 0; give one of them a number above 0",
        ),
        (
            {"query": "a", "where": ["lang"]},
            400,
            '"where" must be an object of fields and values, such as {"lang": "en"}; got a list of '
            "1",
        ),
        (
            {"query": "a", "where": {"lang": [None]}},
            400,
            '"where.lang" must be a text, a number, true or false, or a list of these; got null',
        ),
        (
            {"query": "a", "fusion": "sum"},
            400,
            '"fusion" must be "weighted", "rrf" or "rerank"; got "sum"',
        ),
        (
            {"query": "a", "index": "sparse", "fusion": "rerank"},
            400,
            "reranking needs dense vectors to find its candidates; rank by the weighted sum "
            "instead",
        ),
        (
            {"query": "a", "fusion": "rrf", "candidates": 0},
            400,
            "candidates must be 1 or more with rrf; got 0; only weighted can look at all",
        ),
        (
            {"query": "a", "index": "lost"},
            404,
            'no index is named "lost"; there are: all, codes, task, plain, dense, sparse, multi',
        ),
        (
            {"queries": ["a"] * 101, "k": 1000},
            413,
            '"k" times the number of queries must be at most 100,000; got 101,000; send several '
            "requests",
        ),
        (
            {"queries": ["a"] * 3, "candidates": 100_000},
            413,
            '"candidates" times the number of queries must be at most 250,000; got 300,000; send '
            "several requests",
        ),
        (
            {"queries": ["a"] * 101, "k": 10, "highlight": True},
            413,
            'with highlight, "k" times the number of queries must be at most 1,000; got 1,010; '
            "send several requests",
        ),
        (
            {"query": "a", "where": {f"f{i}": 1 for i in range(101)}},
            413,
            '"where" must have at most 100 conditions; got 101',
        ),
        (
            {"query": "a", "where": {"year": list(range(1_000)), "lang": "en"}},
            413,
            '"where" must have at most 1,000 values; got 1,001',
        ),
        ({"qeury": "a"}, 400, 'unknown field "qeury"; did you mean "query"?'),
    ],
    ids=lambda value: str(value)[:80],
)
def test_what_cannot_be_searched_for_is_refused_with_a_reason(server, fields, status, message):
    answer = server.post("/v1/search", fields)
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)


def test_what_is_just_within_the_limits_is_searched(server, opened):
    where = {f"f{i}": 1 for i in range(99)} | {"lang": [*range(899), "en", "de"]}
    for fields in (
        {"candidates": 83_000, "weights": dict.fromkeys(KINDS, 1_000_000)},
        {"k": 333, "highlight": True},
        {"where": where},
    ):
        answer = server.post("/v1/search", {"index": "all", "queries": QUERIES, **fields})
        assert answer.status_code == 200, answer.text
        assert any(found(answer)) == ("where" not in fields)


def test_all_documents_are_candidates_of_few_queries_only(server, monkeypatch):
    monkeypatch.setattr("tercet.serve.search.endpoints._MOST_ALL_CANDIDATES", 30)
    asked = {"queries": QUERIES, "candidates": 0}
    answer = server.post("/v1/search", asked)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        413,
        'with "candidates" 0, the number of documents times the number of queries must be at most '
        "30; got 36; send several requests",
    )
    assert server.post("/v1/search", asked | {"queries": QUERIES[:2]}).status_code == 200


def test_a_server_without_an_index_says_how_to_make_one(hybrid_folder):
    with serving({"hybrid": hybrid_folder}) as running:
        answer = running.post("/v1/search", {"query": "a"})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == (
            "this server has no index; make one with: tercet index FILE --model MODEL --out "
            "FOLDER, and start the server with: tercet serve --index FOLDER"
        )
        assert answer.json()["error"]["field"] == "index"
        assert running.get("/v1/indexes").json() == {"indexes": []}


def test_state_says_what_each_index_and_model_is(server):
    indexes = {each["name"]: each for each in server.get("/v1/indexes").json()["indexes"]}
    assert list(indexes) == ["all", "codes", "task", "plain", *KINDS]
    codes = indexes["codes"]
    assert codes["disk_bytes"] > 0 and codes["loaded"]
    assert {name: codes[name] for name in ("documents", "kinds", "dims", "precision")} == {
        "documents": len(DOCUMENTS),
        "kinds": list(KINDS),
        "dims": 16,
        "precision": "int8",
    }
    assert (codes["engine"], codes["complete"], codes["error"]) == ("exact", True, None)
    assert indexes["dense"]["kinds"] == ["dense"]
    assert indexes["task"]["task"] == "clustering"
    state = server.get("/v1/state").json()
    assert state["indexes"] == list(indexes.values())
    model = state["models"][0]
    assert (model["name"], model["dim"], model["kinds"]) == ("hybrid", 64, list(KINDS))
    assert model["max_tokens"] == {"query": 32, "document": 64}


def test_an_index_and_the_server_share_a_model_however_it_is_written(
    folders, hybrid_folder, tmp_path
):
    (tmp_path / "link").symlink_to(hybrid_folder)
    with serving({"mine": tmp_path / "link"}, indexes={"docs": folders["all"]}) as running:
        state = running.get("/v1/state").json()
        assert [model["name"] for model in state["models"]] == ["mine"]
        assert state["indexes"][0]["model"] == "mine"


def test_the_model_of_an_index_takes_no_name_that_is_given_to_another(folders, encoder_folder):
    with serving({"hybrid": encoder_folder}, indexes={"docs": folders["all"]}) as running:
        state = running.get("/v1/state").json()
        assert [model["name"] for model in state["models"]] == ["hybrid", "hybrid-2"]
        assert state["indexes"][0]["model"] == "hybrid-2"
        assert found(running.post("/v1/search", {"query": "music", "k": 1}))


def test_a_student_reads_the_queries_of_its_teacher_s_index(folders, encoder_folder, tmp_path):
    """A request names it; other models are refused, and requests without a name get the teacher."""
    student = Embedder.load(encoder_folder, keep_layers=1)
    theirs = Embedder.load(encoder_folder).fingerprints()
    student.settings = replace(
        student.settings, shares_space_with=theirs, distilled_as=student.fingerprints()
    )
    student.save(tmp_path / "student")
    Embedder.load(encoder_folder, keep_layers=1).save(tmp_path / "other")
    place, models = folders["plain"], {name: tmp_path / name for name in ("student", "other")}
    with serving(models=models, indexes={"plain": place, "all": folders["all"]}) as running:
        asked = {"queries": QUERIES, "k": 4}
        with open_index(place, load=load) as usual:
            expected = usual.search(QUERIES, 4)
            same(running.post("/v1/search", asked), expected)
            same(running.post("/v1/search", asked | {"model": encoder_folder.name}), expected)
        with open_index(place, model=str(tmp_path / "student"), load=load) as light:
            expected = light.search(QUERIES, 4)
        for _ in range(2):  # checked at first, and then known
            same(running.post("/v1/search", asked | {"model": "student"}), expected)
        for asked_for, status, message in (
            ({"model": "other"}, 422, "it must be the index's model, "),
            ({"model": "student", "index": "all"}, 422, "it must be the index's model, "),
            ({"model": "nobody"}, 404, 'no model is named "nobody"'),
            ({"model": 3}, 400, '"model" must be a string'),
        ):
            refused = running.post("/v1/search", asked | asked_for)
            assert refused.status_code == status
            assert message in refused.json()["error"]["message"]
        with Client(running.url) as client:
            found_by_it = client.search(QUERIES, 4, model="student")
        assert [[hit.record.id for hit in hits] for hits in found_by_it] == [
            [hit.record.id for hit in hits] for hits in expected
        ]
