import base64
import json
from urllib.parse import quote

import pytest

from tercet.errors import RecipeError
from tercet.files import secrets
from tercet.files.secrets import check_address, hide, redacted, redacted_bytes

KEY = 'sk-"a/b"+c9'


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())


def test_a_key_is_hidden_in_every_form_in_which_it_may_come_back():
    hide(KEY)
    forms = [KEY, KEY.upper(), quote(KEY, safe=""), json.dumps({"key": KEY})]
    forms.append(base64.b64encode(KEY.encode()).decode())
    for form in forms:
        assert "***" in redacted(f"got {form} here")
        assert "a/b" not in redacted(form).lower() and "a%2Fb" not in redacted(form)
    assert redacted(f"Bearer {KEY}.") == "Bearer ***."
    assert redacted_bytes(f"é {KEY} é".encode()) == "é *** é".encode()


def test_what_is_too_short_for_a_key_hides_nothing():
    hide("EMPTY")
    hide("")
    assert redacted("EMPTY lines") == "EMPTY lines"


def test_keys_of_the_environment_and_passwords_in_addresses_are_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("OTHER_API_KEY", "xyz-xyz-xyz\n")
    monkeypatch.setenv("SOMETHING_ELSE", "plain words")
    said = "hf_abcdefgh xyz-xyz-xyz plain words at https://me:pw@host/a@b and a@b.org"
    assert redacted(said) == "*** *** plain words at https://***@b and a@b.org"


@pytest.mark.parametrize("url", ["http://me@host", "http://me:pw1234@host/v1", "http://:pw1234@h"])
def test_an_address_with_a_user_is_refused_without_repeating_it(url):
    with pytest.raises(RecipeError, match="a user or password; use a variable") as refusal:
        check_address(url, "use a variable")
    assert "pw1234" not in str(refusal.value)


def test_a_key_in_the_query_of_an_address_is_hidden_or_refused():
    url = "http://host/v1?api-version=2024-10&api-key=abcd1234"
    check_address(url, "")
    assert redacted(url) == "http://host/v1?api-version=2024-10&api-key=***"
    with pytest.raises(RecipeError, match="the address contains a key; use a variable"):
        check_address(url, "use a variable", keeps_query=True)
