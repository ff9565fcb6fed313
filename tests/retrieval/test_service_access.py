"""Who a request counts for: addresses behind proxies, forged headers, guessed tokens, and the cookies of other services."""

from __future__ import annotations

import pytest
from support.services import TOKEN, client_of

from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service.access import Access, network
from mmref.retrieval.service.limits import Limits

BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "203.0.113.5", "192.0.2.1"),  # no proxy of ours: its word counts for nothing
        ("10.1.0.1", "203.0.113.5", "203.0.113.5"),
        ("10.1.0.1", "198.51.100.9, 203.0.113.5", "203.0.113.5"),  # the left is the client's own invention
        ("10.1.0.1", "203.0.113.5, 10.2.0.7", "203.0.113.5"),
        ("10.1.0.1", "203.0.113.5, 10.2.0.7, 192.0.2.3", "192.0.2.3"),
        ("10.1.0.1", "203.0.113.5:4711", "203.0.113.5"),
        ("10.1.0.1", "[2001:db8:1:2::7]:80", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:3:4:5:6", "", "2001:db8:1:2::/64"),
        ("::ffff:10.1.0.1", "203.0.113.5", "203.0.113.5"),
        ("10.1.0.1", "203.0.113.5, nonsense", "10.1.0.1"),
        ("10.1.0.1", "203.0.113.5, nonsense, 10.2.0.7", "10.2.0.7"),
        ("10.1.0.1", ", ,", "10.1.0.1"),
        ("10.1.0.1", "10.3.0.1, 10.2.0.7", "10.3.0.1"),
        ("10.1.0.1", "203.0.113.5," + "10.2.0.7," * 5000 + "10.2.0.8", "10.2.0.7"),
        ("local", "203.0.113.5", "local"),
    ],
)
def test_the_client_is_the_last_address_before_our_proxies(peer, forwarded, client):
    access = Access(proxies=(network("10.0.0.0/8"),))
    assert access.client(peer, {"x-forwarded-for": forwarded} if forwarded else {}) == client


def test_forged_addresses_open_no_new_bucket(split_index):
    limits, proxies = Limits(rate=0.001, burst=2), (network("10.1.0.1"),)
    for peer, header in (("192.0.2.1", "203.0.113.{}"), ("10.1.0.1", "203.0.113.{}, 192.0.2.7")):
        client = client_of(split_index, access=Access(proxies=proxies), limits=limits, peer=peer)
        codes = [client.get("/search?text=x", headers={"x-forwarded-for": header.format(n)}).status_code for n in range(4)]
        assert codes == [200, 200, 429, 429], peer
    two = [("x-forwarded-for", "203.0.113.1"), ("x-forwarded-for", "198.51.100.2")]  # in two lines
    assert client.get("/search?text=x", headers=two).status_code == 200, "another client of the same proxy"


def test_guessed_tokens_take_nothing_from_valid_users(split_index):
    client = client_of(split_index, access=Access(TOKEN), limits=Limits(rate=0.001, burst=20))
    wrong = {"authorization": "Bearer wrong"}
    assert [client.get("/search?text=x", headers=wrong).status_code for _ in range(6)] == [401] * 4 + [429] * 2
    assert client.post("/session", headers=wrong).status_code == 429, "guesses count here too"
    assert client.get("/search?text=x", headers=BEARER).status_code == 200
    assert client.get("/", headers=wrong).status_code == 200 and client.get("/healthz").status_code == 200
    assert client.post("/session", headers=BEARER).status_code == 204
    assert client.get("/search?text=x").status_code == 200, "by the cookie"
    codes = {client.get("/search?text=x", headers=BEARER).status_code for _ in range(20)}
    assert codes == {200, 429}, "valid users have a bucket too"


def test_pictures_are_charged(split_index):
    item = Searcher(str(split_index)).items["id"][0].as_py()
    for kind, times in (("image", 4), ("thumbnail", 20)):
        client = client_of(split_index, limits=Limits(rate=0.001, burst=2))
        codes = [client.get(f"/{kind}/{item}").status_code for _ in range(times + 1)]
        assert codes[0] == codes[-2] == 200 and codes[-1] == 429, codes


def test_cookies_of_other_services_lock_nobody_out(split_index):
    client, other = (client_of(split_index, access=Access(token)) for token in (TOKEN, TOKEN[::-1]))
    mine, theirs = (
        c.post("/session", headers={"authorization": f"Bearer {t}"}).headers["set-cookie"].partition(";")[0]
        for c, t in ((client, TOKEN), (other, TOKEN[::-1]))
    )
    for c in (client, other):
        c.cookies.clear()
        # one jar for all ports of a host, and what others have put into it
        for odd in (
            "",
            'a[b]={"x": 1}; ',
            "é=ü; ",
            "=; ;;",
            "x y z; ",
            'q="open; ',
            "mmref=old; ",
            f"n={'v' * 9000}; ",
        ):
            jar = f"{odd}{mine}; {theirs}; last@=1".encode()
            assert c.get("/indexes", headers={"cookie": jar}).status_code == 200, odd
            two = [(b"cookie", odd.encode()), (b"cookie", mine.encode()), (b"cookie", theirs.encode())]
            assert c.get("/indexes", headers=two).status_code == 200, odd
        wrong = mine if c is other else theirs
        assert c.get("/indexes", headers={"cookie": wrong}).status_code == 401
