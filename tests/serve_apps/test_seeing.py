"""What a running service shows of itself: metrics that the dashboard asks for, the status of all replicas, and the page."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from playwright.sync_api import Page, expect, sync_playwright

from jobs.serve import where_to_look
from serve_apps.account import Recent, service_status
from tests.serve_apps.services import Front, kept, running, wait_for_replicas
from tests.serving.tables import DAY_MS, START_MS, build_world

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "scoring.json"
TOKEN = "see-me-if-you-can"
BEARER = {"authorization": f"Bearer {TOKEN}"}
HTML = "<img src=x onerror=document.title='broken'>"
END_MS = START_MS + 31 * DAY_MS
_WITHIN_S = 40
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def url(front: Front, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas that have loaded, appended to and hit states."""
    folder = tmp_path_factory.mktemp("seeing")
    (folder / "token").write_text(TOKEN)
    sizes = {"num_replicas": 2, "max_replicas": 2, "token_file": str(folder / "token"), "refresh_s": 2, "warm_users": 1}
    with running(front, build_world(folder), **sizes) as service:
        # A user whose request came first is not warmed, and a counter that has counted nothing is not exported.
        wait_for_replicas(service, lambda replicas: kept(replicas)["warmed"] > 0, BEARER)
        event = {"item_id": HTML, "event_ts": END_MS, "action": "buy", "features": {"quantity": 1}}
        for events in ([], [], [event]):
            for user in range(9, 0, -1):
                body = {"user_id": user, "candidates": ["item1"], "request_ts": END_MS + 1, "events": events}
                headers = {**BEARER, "x-session-id": str(user)}
                assert httpx.post(f"{service}/v1/score", json=body, headers=headers, timeout=30).status_code == 200
        assert httpx.post(f"{service}/v1/score", json=body, headers=BEARER, timeout=30).status_code == 200
        assert httpx.get(f"{service}/v1/status").status_code == 401
        yield service


def exported() -> str:
    """Every metric of this node, as Prometheus reads them."""
    [node] = [node for node in ray.nodes() if node["Alive"]]
    return httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text


@pytest.mark.ray
def test_one_replica_tells_the_state_of_all(url: str) -> None:
    status = httpx.get(f"{url}/v1/status", headers=BEARER, timeout=30).json()
    assert len(status["replicas"]) == 2
    assert status["cache"]["states"] == sum(one["cache"]["states"] for one in status["replicas"]) >= 9
    assert status["recent"]["requests"] == 28
    assert status["recent"]["shares"]["append"] == pytest.approx(9 / 28)
    assert 0 < status["recent"]["p50_ms"] <= status["recent"]["p99_ms"]
    assert status["lost_affinity"]["no_session"] == 1
    assert status["ids"] == {"user_id": "int64", "item_id": "string"}


@pytest.mark.ray
def test_the_start_tells_where_metrics_and_access_log_are_whatever_ray_was_started_last(url: str) -> None:
    told = re.fullmatch(r"metrics at (\S+), access log in (\S+)", where_to_look())
    assert told
    assert "ray_node_" in httpx.get(told[1], timeout=30).text
    log = Path(told[2])
    replicas = httpx.get(f"{url}/v1/status", headers=BEARER, timeout=30).json()["replicas"]
    logs = {f"access_{one['replica']}.jsonl" for one in replicas}
    deadline = time.monotonic() + _WITHIN_S
    while missing := logs - {file.name for file in log.parent.glob(log.name)}:  # a replica writes lines once a second
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
    assert "session_latest" not in log.parts


@pytest.mark.ray
def test_the_dashboard_asks_for_what_a_replica_exports_and_for_all_of_it(url: str) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {name for panel in dashboard["panels"] for t in panel["targets"] for name in names_in(t["expr"])}
    deadline = time.monotonic() + _WITHIN_S
    while True:
        text = exported()
        ours = re.findall(r"^(ray_longer_\w+)\{([^}]*)\}", text, re.MULTILINE)
        names = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in ours}
        if names == {re.sub(r"_bucket$", "", name) for name in asked} and "append" in text:
            break
        assert time.monotonic() < deadline, (names ^ asked, text.count("ray_longer"))
        time.sleep(1)
    assert {name for name, _ in ours} >= asked
    assert set(re.findall(r'stage="(\w+)"', text)) == {"queue", "history", "encode", "append", "score"}
    assert all('application="scoring"' in labels and "replica=" in labels for _, labels in ours)
    [variable] = [v for v in dashboard["templating"]["list"] if v["name"] == "application"]
    assert names_in(variable["query"]) <= asked


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_a_status_of_replicas_without_requests_has_no_latency_and_no_shares() -> None:
    account: dict[str, Any] = {"model_version": "m", "cache": {"hit": 0}, "lost_affinity": {"no_session": 0}}
    status = service_status([{**account, "recent": Recent().account()}] * 2, 1)
    assert status["recent"] == {"requests": 0, "requests_per_s": 0, "shares": {}, "p50_ms": None, "p99_ms": None}
    assert (status["model_versions"], status["silent_replicas"]) == (["m"], 1)


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    """The page in a real browser; nothing may be refused by its content security policy or fail in its script."""
    if CHROMIUM is None:
        pytest.skip("needs a browser: install Debian's chromium")
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page()
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("console", lambda line: said.append(line.text) if "Security Policy" in line.text else None)
        shown.goto(url)
        yield shown
        browser.close()
    assert said == []


@pytest.mark.ray
def test_the_documentation_of_the_calls_loads_nothing_from_elsewhere(page: Page, url: str) -> None:
    page.goto(f"{url}/docs")
    expect(page.locator("#swagger-ui")).to_contain_text("/v1/score:batch")
    assert page.evaluate("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")


@pytest.mark.ray
def test_the_page_shows_the_service_and_scores_a_user_by_hand(page: Page, url: str) -> None:
    expect(page.locator("#trouble")).to_contain_text("authorization")
    page.locator("#token").fill(TOKEN)
    page.locator("#token").blur()
    expect(page.locator("#trouble")).to_be_empty()
    expect(page.locator("#count")).to_have_text("2")
    expect(page.locator("#replicas tr")).to_have_count(2)
    for field in ("#hit", "#append", "#p50", "#p99", "#bytes", "#model"):
        expect(page.locator(field)).to_contain_text(re.compile(r"\d"))
    page.locator("#user").fill("5")
    page.locator("#items").fill(f"item1\n\n{HTML}\n")
    page.get_by_role("button").click()
    expect(page.locator("#state")).to_contain_text("hit: 26 events")
    expect(page.locator("#scores tr")).to_have_count(2)
    expect(page.locator("#scores tr").nth(1)).to_contain_text(HTML)
    body = {"user_id": 5, "candidates": ["item1"]}
    scored = httpx.post(f"{url}/v1/score", json=body, headers=BEARER | {"x-session-id": "5"}, timeout=30).json()
    expect(page.locator("#scores tr").nth(0)).to_contain_text(f"{scored['scores']['label'][0]:.6f}")
    page.locator("#user").fill(HTML)
    page.get_by_role("button").click()
    expect(page.locator("#refused")).to_have_text("ids here are integers")
    expect(page.locator("#scores tr")).to_have_count(0)
    assert page.locator("img").count() == 0
    assert page.title() == "longer scoring"
    assert page.evaluate("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
