"""Tokens and keys, without a relay: what opens a channel, and everything that must not."""

from __future__ import annotations

import base64
import codecs
import contextlib
import datetime as dt
import functools
import hmac
import json
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from hypothesis import example, given
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from sse_relay import (
    MAX_TOKEN_BYTES,
    Access,
    Grant,
    Key,
    RefusedError,
    UnusableKeyError,
    compile_globs,
    read_key,
    sign_token,
    verify_token,
)

SECRET = b"a secret of the tests, of 32 bytes or more"
NOW = 1_700_000_000.0


@functools.cache
def private_key(kind: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "RSA": lambda: rsa.generate_private_key(65537, 2048),
        "another RSA": lambda: rsa.generate_private_key(65537, 2048),
        "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "Ed25519": ed25519.Ed25519PrivateKey.generate,
        "RSA of 1024 bits": lambda: rsa.generate_private_key(65537, 1024),  # noqa: S505  # to be refused
        "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
        "Ed448": ed448.Ed448PrivateKey.generate,
        "X25519": x25519.X25519PrivateKey.generate,
        "DSA": lambda: dsa.generate_private_key(1024),  # noqa: S505  # to be refused
    }
    return makers[kind]()


ALGORITHMS = {"RSA": "RS256", "P-256": "ES256", "Ed25519": "EdDSA"}
UNFIT = ["RSA of 1024 bits", "P-384", "secp256k1", "Ed448", "X25519", "DSA"]


def public_pem(kind: str) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem: bytes = private_key(kind).public_key().public_bytes(serialization.Encoding.PEM, form)
    return pem


def private_pem(kind: str, form: object = serialization.PrivateFormat.PKCS8, password: bytes = b"") -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem: bytes = private_key(kind).private_bytes(serialization.Encoding.PEM, form, encryption)
    return pem


def encode_part(part: object) -> str:
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def jwk_of(kind: str) -> dict[str, Any]:
    return RSAAlgorithm.to_jwk(private_key(kind).public_key(), as_dict=True)


HEADER: Mapping[str, object] = {"alg": "HS256", "typ": "JWT"}


def forge(claims: object, header: object = HEADER, secret: bytes = SECRET, digest: str = "sha256") -> str:
    """Sign by hand, with HMAC, what a library would refuse to sign."""
    signed = f"{encode_part(header)}.{encode_part(claims)}"
    return f"{signed}.{encode_part(hmac.digest(secret, signed.encode(), digest))}"


@functools.cache
def forged_tokens(now: float) -> dict[str, str]:
    """Return tokens of which none may open the channel ``orders``.

    The relay knows `SECRET` and the public key of RSA; it must refuse each with 401.
    """
    good = {"exp": now + 3600, "channels": ["orders"]}
    unsigned = f"{encode_part({'alg': 'none', 'typ': 'JWT'})}.{encode_part(good)}."
    good_token = forge(good)
    head, body, signature = good_token.split(".")

    def without(claim: str) -> dict[str, object]:
        return {key: value for key, value in good.items() if key != claim}

    odd_times: dict[str, object] = {
        "true": True, "a string": str(int(now + 3600)), "NaN": math.nan, "infinite": math.inf,
        "1e308": 1e308, "below -1e308": -1e308, "too many digits": 10**400, "null": None,
        "a list": [now + 3600], "an object": {"exp": now + 3600},
    }  # fmt: skip
    odd_audiences: list[object] = ["", [], None, {}, 0, False]
    odd_subjects: list[object] = [True, 7.5, [], ["user-7"], {}]
    odd_lists: dict[str, object] = {
        "a string": "orders", "the glob alone": "*", "an object": {"orders": True}, "null": None,
        "true": True, "a number": 7, "numbers in it": [7], "null in it": ["orders", None],
        "a list in it": [["orders"]], "an object in it": [{"orders": 1}],
    }  # fmt: skip
    return {
        "alg none": unsigned,
        "alg None": unsigned.replace(head, encode_part({"alg": "None"})),
        "alg none, with a signature": unsigned + signature,
        "alg none, no second dot": unsigned.rstrip("."),
        "no alg": forge(good, {"typ": "JWT"}),
        "alg a number": forge(good, {"alg": 256}),
        "alg a list": forge(good, {"alg": ["HS256"]}),
        "alg hs256": forge(good, {"alg": "hs256"}),
        "alg HS384": forge(good, {"alg": "HS384"}, digest="sha384"),
        "alg HS512": forge(good, {"alg": "HS512"}, digest="sha512"),
        "alg RS256, signed with the secret": forge(good, {"alg": "RS256"}),
        "another secret": jwt.encode(good, b"another secret of 32 bytes or more", "HS256"),
        "the secret's first half": forge(good, secret=SECRET[:20]),
        "no secret": forge(good, secret=b""),
        "another private key": jwt.encode(good, private_key("another RSA"), "RS256"),
        "HS256 by the public key": forge(good, secret=public_pem("RSA")),
        "HS256 by the public key, one line end less": forge(good, secret=public_pem("RSA").strip()),
        "PS256 by the right key": jwt.encode(good, private_key("RSA"), "PS256"),
        "RS512 by the right key": jwt.encode(good, private_key("RSA"), "RS512"),
        "a key of its own (jwk)": jwt.encode(
            good, private_key("another RSA"), "RS256", {"jwk": jwk_of("another RSA")}
        ),
        "an algorithm without a key": jwt.encode(good, private_key("Ed25519"), "EdDSA"),
        "a path for a key (kid)": forge(good, {"alg": "HS256", "kid": "/dev/null"}, b""),
        "a critical extension": forge(good, {"alg": "HS256", "crit": ["exp"], "exp": 1}),
        "a detached body": forge(good, {"alg": "HS256", "b64": False, "crit": ["b64"]}),
        "no signature": f"{head}.{body}.",
        "a signature cut short": good_token[:-2],
        "a body changed": f"{head}.{encode_part({**good, 'channels': ['*']})}.{signature}",
        "a header changed": f"{encode_part({'alg': 'HS256'})}.{body}.{signature}",
        "five parts": f"{good_token}.{body}.{signature}",
        "expired": forge({**good, "exp": now - 1}),
        "expired long ago": forge({**good, "exp": 0}),
        "not yet valid": forge({**good, "nbf": now + 1800}),
        "nbf a string": forge({**good, "nbf": "0"}),
        "nbf NaN": forge({**good, "nbf": math.nan}),
        "no exp": forge(without("exp")),
        "no channels": forge(without("channels")),
        "Channels, not channels": forge({**without("channels"), "Channels": ["orders"]}),
        "a scope instead": forge({**without("channels"), "scope": "orders *"}),
        "meant for others": forge({**good, "aud": "billing"}),
        "meant for several others": forge({**good, "aud": ["billing", "orders"]}),
        **{f"aud {aud!r}": forge({**good, "aud": aud}) for aud in odd_audiences},
        **{f"sub {sub!r}": forge({**good, "sub": sub}) for sub in odd_subjects},
        "exp in milliseconds": forge({**good, "exp": (now + 3600) * 1000}),
        "claims a list": forge(["orders"]),
        "claims a string": forge("orders"),
        "claims no JSON": forge(b"orders"),
        "claims nested deeply": forge(b"[" * 5_500),
        "claims a long number": forge(b'{"exp": ' + b"9" * 5_000 + b"}"),
        "a header no JSON": forge(good, b"HS256"),
        "a header nested deeply": forge(good, b"[" * 5_500),
        "the secret itself": SECRET.decode(),
        "the public key itself": encode_part(public_pem("RSA")),
        "8 kB of letters": "a" * 8_000,
        "8 kB of dots": "." * 8_000,
        "8 kB in three parts": ".".join(["a" * 2_600] * 3),
        **{f"exp {kind}": forge({**good, "exp": value}) for kind, value in odd_times.items()},
        **{f"channels {kind}": forge({**good, "channels": value}) for kind, value in odd_lists.items()},
    }  # fmt: skip


# Well signed, but none of them opens the channel orders: 403.
OTHER_GRANTS: dict[str, list[str]] = {
    "an empty list": [],
    "an empty name": [""],
    "another channel": ["stock"],
    "upper case": ["ORDERS", "Orders"],
    "a Cyrillic o": ["\N{CYRILLIC SMALL LETTER O}rders"],
    "full-width letters": ["\uff4f\uff52\uff44\uff45\uff52\uff53"],
    "a long s": ["order\N{LATIN SMALL LETTER LONG S}"],
    "a zero-width space": ["orders\u200b", "\u200borders"],
    "blanks": [" orders", "orders ", "orders\n", "orders\0"],
    "a part": ["order", "rders", "orders-"],
    "a regular expression": [".*", ".+", "o.*", "orders|x", "[o]rders", "^orders$", "(orders)", "orders?"],
    "other wildcards": ["order?", "order%", "order_", "orders/**", "[a-z]rders", "{orders,stock}"],
    "an escape": [r"\*", r"order\s", r"\orders"],
    "a star that does not fit": ["*-orders", "orders-*", "tenant-*", "o*x", "*orders*orders*"],
    "a star of another script": ["\u2217", "\uff0a", "order\u2217"],
}

KEYS = [read_key(SECRET)]


def verify(token: str, now: float = NOW, keys: list[Key] | None = None) -> Grant:
    return verify_token(token, KEYS if keys is None else keys, now)


def opens(grant: Grant, channel: str) -> bool:
    return grant.channels.fullmatch(channel) is not None


# ==== Tokens ==================================================================


def test_a_token_of_each_algorithm_opens_its_channels_until_it_ends_whatever_other_keys_there_are() -> None:
    keys = [read_key(content) for content in (public_pem("RSA"), SECRET, *map(public_pem, ALGORITHMS))]
    for signing, algorithm in (
        (SECRET, "HS256"),
        *((private_pem(kind), ALGORITHMS[kind]) for kind in ALGORITHMS),
    ):
        signer = read_key(signing, private=True)
        token = sign_token(signer, ["orders", "tenant-7-*"], int(NOW) + 60, NOW - 1.5, "user-7")
        assert jwt.get_unverified_header(token)["alg"] == algorithm
        grant = verify(token, keys=keys)
        assert (grant.expires, grant.subject, grant.issued) == (NOW + 60, "user-7", NOW - 1.5)
        names = ["orders", "tenant-7-", "tenant-7-x", "tenant-77", "stock"]
        assert [opens(grant, name) for name in names] == [True, True, True, False, False]


UNSIGNED = "the token is not signed with a key of this relay"
# What the client is told to fix, by the first words of the forged token's name.
REASONS = {
    "expired": "the token has expired",
    "exp 0": "the token has expired",
    "not yet valid": "the token is not valid yet (nbf)",
    "nbf": "the token is not valid yet (nbf)",
    "exp in milliseconds": "the token ends in more than ten years (exp): is that in milliseconds?",
    "exp": "the token does not say when it ends (exp)",
    "no exp": "the token does not say when it ends (exp)",
    "meant for": "the token is meant for others (aud)",
    "aud": "the token is meant for others (aud)",
    "sub": "the token's subject (sub) is neither text nor an integer",
    "no channels": "the token's claim channels is no list of names or globs",
    "channels": "the token's claim channels is no list of names or globs",
    "Channels": "the token's claim channels is no list of names or globs",
    "a scope": "the token's claim channels is no list of names or globs",
}


@pytest.mark.parametrize("name", forged_tokens(NOW))
def test_a_forged_token_is_refused_with_what_to_fix_and_not_repeated(name: str) -> None:
    keys = [read_key(public_pem("RSA")), read_key(SECRET)]
    token = forged_tokens(NOW)[name]
    with pytest.raises(RefusedError) as refused:
        verify(token, keys=keys)
    reasons = [reason for start, reason in REASONS.items() if name.startswith(start)]
    assert (refused.value.status, refused.value.what) == (401, [*reasons, UNSIGNED][0])
    for part in token.split("."):
        assert len(part) < 8 or part not in refused.value.what


@pytest.mark.parametrize("name", OTHER_GRANTS)
def test_a_glob_opens_what_it_says_and_nothing_that_looks_like_it(name: str) -> None:
    assert not opens(verify(forge({"exp": NOW + 60, "channels": OTHER_GRANTS[name]})), "orders")


def test_there_is_no_leeway_at_either_end() -> None:
    token = forge({"nbf": NOW, "exp": NOW + 10.5, "channels": ["orders"]})
    for moment, reason in ((NOW - 0.001, "valid yet"), (NOW + 10.5, "expired"), (NOW + 11, "expired")):
        with pytest.raises(RefusedError, match=reason):
            verify(token, now=moment)
    for moment in (NOW, NOW + 10.499):
        assert verify(token, now=moment).expires == NOW + 10.5


@pytest.mark.parametrize(
    ("claims", "subject", "issued"),
    [
        ({}, None, 0),
        ({"sub": "user-7", "iat": NOW - 5}, "user-7", NOW - 5),
        ({"sub": 7, "iat": NOW - 0.25}, "7", NOW - 0.25),
        ({"sub": -7}, "-7", 0),
        ({"sub": ""}, None, 0),
        ({"sub": None}, None, 0),
        ({"iat": NOW + 60}, None, NOW + 60),
        ({"iat": NOW + 60.5}, None, 0),
        ({"iat": NOW * 1000}, None, 0),
        ({"iat": str(NOW)}, None, 0),
        ({"iat": True}, None, 0),
        ({"iat": None}, None, 0),
        # Some libraries sign sub as a number; other claims mean nothing here.
        ({"sub": 8, "jti": 8, "iss": "app", "iat": NOW + 5}, "8", NOW + 5),
    ],
)
def test_a_grant_tells_whose_it_is_and_since_when(
    claims: dict[str, object], subject: str | None, issued: float
) -> None:
    grant = verify(forge({"exp": NOW + 60, "channels": ["orders"], **claims}))
    assert (grant.subject, grant.issued) == (subject, issued)


DAY = 86_400


@pytest.mark.parametrize(
    ("claims", "refused"),
    [
        ({"sub": "user-7", "iat": NOW - 10.001}, True),
        ({"sub": "user-7", "iat": NOW - 10}, True),
        ({"sub": "user-7", "iat": NOW - 9.999}, False),
        ({"sub": "user-7"}, True),
        ({"sub": "user-7", "iat": NOW + 61}, True),
        ({"sub": 7, "iat": NOW - 11}, True),
        ({"sub": "User-7", "iat": NOW - 11}, False),
        ({"iat": NOW - 11}, False),
        ({"sub": "user-8"}, False),
        ({"sub": "user-8", "iat": NOW - 30 * DAY - 1}, True),
        ({"sub": "user-8", "iat": NOW - 30 * DAY + 1}, False),
        ({"iat": NOW - 300 * DAY}, False),
    ],
)
def test_tokens_of_before_a_revocation_open_nothing(claims: dict[str, object], refused: bool) -> None:
    access = Access(compile_globs(["open"]), compile_globs([]), KEYS, revoked={})
    for subject in ("user-7", "7"):
        access.revoke(subject, NOW - 20)
        access.revoke(subject, NOW - 10)
        access.revoke(subject, NOW - 15)
    token = forge({"exp": NOW + 60, "channels": ["orders"], **claims})
    assert access.check(["open"], token, NOW) is None
    if refused:
        with pytest.raises(RefusedError) as caught:
            access.check(["orders"], token, NOW)
        assert caught.value.status == 401
    else:
        assert access.check(["orders"], token, NOW) == verify(token)


def test_revocations_are_kept_for_thirty_days_and_without_any_no_token_is_too_old() -> None:
    token = forge({"exp": NOW + 60, "channels": ["orders"], "sub": "user-7", "iat": NOW - 300 * DAY})
    assert Access(compile_globs([]), compile_globs([]), KEYS).check(["orders"], token, NOW)
    access = Access(compile_globs([]), compile_globs([]), KEYS, revoked={})
    for number in range(100):
        access.revoke(f"user-{number}", NOW + number * DAY)
    access.revoke("user-99", NOW)
    assert access.revoked == {f"user-{number}": NOW + number * DAY for number in range(69, 100)}


def test_the_longest_token_is_read_and_a_longer_one_is_not() -> None:
    tokens = [forge({"exp": NOW + 60, "channels": ["orders", "x" * size]}) for size in range(5_500, 6_500)]
    kept = [token for token in tokens if len(token) <= MAX_TOKEN_BYTES]
    assert len(kept[-1]) > MAX_TOKEN_BYTES - 4
    assert opens(verify(kept[-1]), "orders")
    with pytest.raises(RefusedError, match="too long"):
        verify(tokens[len(kept)])


@given(st.text(st.sampled_from([*string.ascii_letters, *string.digits, *".-_= é\udcff\0"])) | st.text())
def test_any_text_is_refused_and_raises_nothing_else(text: str) -> None:
    with pytest.raises(RefusedError):
        verify(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["exp", "nbf", "iat", "aud", "iss", "sub", "jti", "channels"]),
        JSON | st.just(NOW + 60) | st.just(["orders"]),
    )
)
@example({"exp": NOW + 60, "channels": ["orders"]})
def test_any_claims_give_a_grant_with_an_end_or_a_refusal(claims: dict[str, object]) -> None:
    with contextlib.suppress(RefusedError):
        grant = verify(forge(claims))
        assert math.isfinite(grant.expires)
        assert grant.expires > NOW
        assert isinstance(claims["channels"], list)


@given(JSON)
def test_any_header_is_refused_but_the_algorithm_of_the_key(header: object) -> None:
    with pytest.raises(RefusedError):
        verify(forge({"exp": NOW + 60, "channels": ["orders"]}, header))


# ==== Key files ===============================================================


def certificate() -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "app")])
    key, start = private_key("RSA"), dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, start, start.replace(year=2100))
    return builder.sign(key, hashes.SHA256())


def public_forms() -> dict[str, bytes]:
    """Return what is known to everybody, in the forms that are about besides PEM of a public key."""
    public = private_key("RSA").public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    openssh = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    jwk = jwk_of("RSA")
    chain = certificate()
    return {
        "DER": der,
        "DER in base64": base64.b64encode(der),
        "DER in base64, in lines": base64.encodebytes(der),
        "OpenSSH": openssh,
        "RFC 4716": b"---- BEGIN SSH2 PUBLIC KEY ----\n" + base64.encodebytes(openssh.split()[1]),
        "JWK": json.dumps(jwk).encode(),
        "JWK set": json.dumps({"keys": [jwk]}, indent=2).encode(),
        "UTF-16": public_pem("RSA").decode().encode("utf-16"),
        "UTF-16 without its mark": public_pem("RSA").decode().encode("utf-16-le"),
        "a certificate": chain.public_bytes(serialization.Encoding.PEM),
        "a certificate as DER": chain.public_bytes(serialization.Encoding.DER),
    }


TRADITIONAL = serialization.PrivateFormat.TraditionalOpenSSL
PRIVATE, NO_PRIVATE = "this is a private key.*openssl pkey -in FILE -pubout", "no private key"
UNFIT_REASON = "RSA of 2048 bits or more, P-256, Ed25519"
NO_PEM, ENCRYPTED = "no key in PEM form", "encrypted with a password"


def key_files() -> Iterator[tuple[bytes, str | None, str | None]]:
    """Yield contents of files, and the reasons why they cannot verify and cannot sign; None: they can."""
    for kind in ALGORITHMS:
        yield public_pem(kind), None, NO_PRIVATE
        yield codecs.BOM_UTF8 + public_pem(kind), None, NO_PRIVATE
        yield private_pem(kind), PRIVATE, None
    for kind in ("RSA", "P-256"):
        yield private_pem(kind, TRADITIONAL), PRIVATE, None
    for kind in UNFIT:
        yield public_pem(kind), UNFIT_REASON, NO_PRIVATE
        yield private_pem(kind), PRIVATE, UNFIT_REASON
    for form in (serialization.PrivateFormat.PKCS8, TRADITIONAL):
        yield private_pem("RSA", form, b"password"), PRIVATE, ENCRYPTED
    for broken in (
        b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----\nnonsense, but long enough to be a secret\n-----END PUBLIC KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----",
        b"-----BEGIN NOTHING-----\n" * 3,
    ):
        yield broken, NO_PEM, NO_PRIVATE
    for secret in (b"", b"\n", b"x" * 31, b"x" * 31 + b"\n", b"x" * 31 + b"\r\n"):
        yield secret, "at least 32 .*openssl rand -hex 32", "at least 32 .*openssl rand -hex 32"
    # PowerShell 5 writes it so.
    for encoding in ("utf-16-le", "utf-16-be"):
        yield f"\ufeff{SECRET.decode()}\r\n".encode(encoding), "UTF-16", "UTF-16"
    for name, content in public_forms().items():
        yield content, "openssl x509 -in FILE -noout -pubkey" if name == "a certificate" else "key", "key"


def test_a_key_file_verifies_or_signs_or_is_refused_with_its_reason() -> None:
    for content, verifying, signing in key_files():
        for private, reason in ((False, verifying), (True, signing)):
            if reason is None:
                assert read_key(content, private=private).algorithm in ALGORITHMS.values()
            else:
                with pytest.raises(UnusableKeyError, match=reason):
                    read_key(content, private=private)


def test_a_secret_is_taken_as_it_is_but_for_one_line_end_and_a_mark() -> None:
    for secret in (
        SECRET, SECRET + b"\n", b" " + SECRET + b" ", SECRET + b"\t", b"\n" + SECRET, bytes(range(128, 160)),
        b"{" + bytes(31), b"0" * 64, b"[" + SECRET, b"1" * 40,
    ):  # fmt: skip
        for content in (secret + b"\n", secret + b"\r\n", codecs.BOM_UTF8 + secret + b"\n"):
            assert read_key(content) == read_key(content, private=True) == Key("HS256", secret)


@given(st.binary(max_size=200))
@example(b"-----BEGIN EC PRIVATE KEY-----\n\xff\n-----END EC PRIVATE KEY-----")
def test_any_content_is_a_key_or_refused(content: bytes) -> None:
    for private in (False, True):
        with contextlib.suppress(UnusableKeyError):
            secret = re.sub(rb"\A\xef\xbb\xbf|\r?\n?\Z", b"", content)
            assert read_key(content, private=private) == Key("HS256", secret)
