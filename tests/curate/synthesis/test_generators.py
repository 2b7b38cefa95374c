import pytest
import torch

from tercet.curate.synthesis.generators import (
    Answer,
    Generator,
    LocalGenerator,
    Prompt,
    SeededDraw,
    TokenSampling,
)
from tercet.errors import ModelError, RecipeError
from tests.answering import written
from tests.toy import SENTENCES, save_model

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
PROMPTS = [Prompt(text[: 6 + 3 * n], 100 + n) for n, text in enumerate(SENTENCES[:7])]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return written(tmp_path_factory.mktemp("writer"), template=TEMPLATE)


def answers(folder, prompts=PROMPTS, sampling: TokenSampling | None = None, **how) -> list[Answer]:
    sampling = sampling or TokenSampling(max_tokens=12)
    generator = LocalGenerator(folder, sampling, **how)
    assert isinstance(generator, Generator)
    return [answer for _, answer in sorted(generator.answers(prompts), key=lambda pair: pair[0])]


def test_an_answer_hangs_on_the_seed_and_not_on_the_batch(writer):
    together = answers(writer, batch=4)
    assert together == answers(writer, batch=1) == answers(writer, PROMPTS, batch=7)
    assert len({answer.text for answer in together}) == len(PROMPTS)
    reseeded = answers(writer, [Prompt(prompt.text, prompt.seed + 1) for prompt in PROMPTS])
    assert all(a.text != b.text for a, b in zip(together, reseeded, strict=True))


def test_without_temperature_the_likeliest_tokens_are_taken_in_a_plain_loop(writer):
    generator = LocalGenerator(writer, TokenSampling(temperature=0, max_tokens=5), batch=3)
    model, tokenizer = generator.model, generator.tokenizer
    for number, answer in generator.answers(PROMPTS):
        # The template brings the special tokens; the tokenizer's own would stand there twice.
        whole = f"<s>{PROMPTS[number].text}</s>"
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert ids[0] == 1 and ids[-1] == 2 and tokenizer(whole)["input_ids"] == [1, *ids]
        begin = len(ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert answer.text == tokenizer.decode(ids[begin:], skip_special_tokens=True)


def test_draws_follow_the_softmax_of_the_likeliest_tokens():
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    sampling = TokenSampling(temperature=0.8, top_p=0.97)
    chances = (logits.double() / 0.8).softmax(0)
    assert float(chances[:2].sum()) < 0.97 < float(chances[:3].sum())
    expected = chances[:3] / chances[:3].sum()
    draws = 6000
    draw = SeededDraw(sampling, range(draws))
    noisy = draw(torch.zeros(draws, 1, dtype=torch.int64), logits.expand(draws, 4))
    counts = noisy.argmax(1).bincount(minlength=4)
    assert int(counts[3]) == 0
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((counts[:3] / draws - expected).abs() < 4 * error).all()


def test_all_tokens_are_drawn_from_where_their_whole_share_is_asked_for():
    logits = torch.zeros(400, 5)
    draw = SeededDraw(TokenSampling(top_p=1), range(400))
    assert set(draw(torch.zeros(400, 1, dtype=torch.int64), logits).argmax(1).tolist()) == set(
        range(5)
    )


def test_a_model_that_does_not_chat_answers_with_one_line(tmp_path, monkeypatch):
    generator = LocalGenerator(written(tmp_path), TokenSampling(max_tokens=4))
    said = iter(["\n What is ls? \nIt is", "  \n"])
    monkeypatch.setattr(generator.tokenizer, "decode", lambda *_, **__: next(said))
    found = dict(generator.answers(PROMPTS[:2]))
    assert found == {0: Answer("What is ls? "), 1: Answer("")}


def test_a_prompt_that_does_not_fit_is_a_failure_and_the_others_are_answered(writer):
    long = Prompt("maps " * 200, 1)
    found = answers(writer, [PROMPTS[0], long, PROMPTS[1]], batch=3)
    assert [answer.failure is None for answer in found] == [True, False, True]
    assert str(found[1].failure).endswith("tokens, and the model takes 116")
    assert (found[0], found[2]) == tuple(answers(writer, PROMPTS)[:2])


def test_about_has_all_that_answers_depend_on(writer):
    about = LocalGenerator(writer, dtype=torch.bfloat16).about
    assert about == {
        "model": str(writer),
        "precision": "bfloat16",
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 64,
    }


def test_models_that_do_not_write_are_refused(tmp_path, encoder_folder):
    headless = save_model(tmp_path / "headless", "llama")
    with pytest.raises(ModelError, match=r"headless: the weights of its language-model head"):
        LocalGenerator(headless)
    with pytest.raises(ModelError, match="lost: no such folder"):
        LocalGenerator(tmp_path / "lost")
    with pytest.raises(ModelError, match=r"cannot write texts|head are missing"):
        LocalGenerator(encoder_folder)


@pytest.mark.parametrize(
    "how", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}]
)
def test_sampling_out_of_range_is_refused(how):
    with pytest.raises(RecipeError, match="temperature must be at least 0"):
        TokenSampling(**how)
