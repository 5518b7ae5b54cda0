"""What an operator does on a run's page: each act asks first, and says what is refused."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, expect

from dashboard.page_parts import OpenPage, Train, reaches, row_of
from freestep import Client
from harness import ThreadService
from meanwhile import wait_until
from plain_calls import Api, slug

pytestmark = pytest.mark.slow


def twice(button: Locator) -> None:
    """Presses a button that asks, and then answers it."""
    made = button.element_handle()
    assert made is not None
    made.click()
    made.click()


def test_an_act_takes_a_second_click(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    checkpoints = page.get_by_role("region", name="Checkpoints").locator("tbody tr")
    expect(checkpoints).to_have_count(1)
    api.push(api.lease(), 0)
    asked: list[str] = []
    page.on("request", lambda request: request.method == "GET" or asked.append(request.url))
    page.get_by_role("button", name="Write a checkpoint").click()
    armed = page.get_by_role("button", name="Write one now?")
    expect(armed).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Write a checkpoint")).to_be_focused()
    page.keyboard.press("Enter")
    expect(armed).to_be_visible()
    page.keyboard.press("Escape")
    # Nobody has read the question in between.
    page.get_by_role("button", name="Write a checkpoint").dblclick()
    expect(armed).to_be_visible()
    page.keyboard.press("Escape")
    for _ in range(3):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    expect(armed).to_be_visible()
    assert not asked
    page.keyboard.press("Enter")
    expect(page.get_by_text("checkpoint of step 1 written")).to_be_visible()
    expect(checkpoints).to_have_count(2)
    # Back to the oldest.
    restore = checkpoints.last.get_by_role("button")
    restore.click()
    restore.click()
    expect(page.get_by_text("the run is back at step 0")).to_be_visible()
    expect(page.locator(".facts").first).to_contain_text("epoch 2")
    assert api.status()["epoch"] == 2


def test_a_run_is_paused_and_goes_on(service: ThreadService, open_page: OpenPage, train: Train, run: str) -> None:
    train(service, run)
    page = open_page(service.url, f"#/runs/{run}")
    reaches(page, 3)
    twice(page.get_by_role("button", name="Pause", exact=True))
    expect(page.get_by_text("Paused: pushes are refused")).to_be_visible()
    expect(page.locator(".events")).to_contain_text("paused = true, by admin-token")
    with Client(service.url) as client:
        step = client.run(run).status().step
        twice(page.get_by_role("button", name="Resume"))
        expect(page.get_by_text("Paused: pushes are refused")).to_be_hidden()
        wait_until(lambda: client.run(run).status().step > step + 3)


def test_a_learning_rate_is_set(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    setting = page.locator(".setting", has=page.get_by_label("lr", exact=True))
    expect(setting.get_by_role("textbox")).to_have_value("0.5")
    # What is no value is not even asked for.
    setting.get_by_role("textbox").fill("much")
    setting.get_by_role("button").click()
    expect(page.get_by_role("alert").filter(has_text="much is no value")).to_be_visible()
    expect(setting.get_by_role("button")).to_have_text("Set")
    setting.get_by_role("textbox").fill("-1")
    twice(setting.get_by_role("button"))
    expect(page.get_by_role("alert").filter(has_text="lr")).to_be_visible()
    assert api.status()["control"]["optimizer"] == {}
    setting.get_by_role("textbox").fill("0.25")
    twice(setting.get_by_role("button"))
    expect(page.locator(".events")).to_contain_text("optimizer.lr = 0.25, by admin-token")
    assert api.status()["control"]["optimizer"]["lr"] == 0.25
    api.http.patch(api.path(), json={"aggregation": {"policy": "ringmaster"}})
    expect(page.locator(".facts").first).to_contain_text("ringmaster")


def test_a_policy_is_set(api: Api, open_page: OpenPage) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 5})
    page = open_page(api.url, f"#/runs/{api.run}")
    fields = page.get_by_role("group", name="Aggregation")
    policy, batch = fields.get_by_label("policy", exact=True), fields.get_by_label("batch")
    expect(policy).to_have_value("buffered")
    expect(batch).to_have_value("5")
    policy.select_option("quorum")
    for given, refusal in (("", "needs a batch"), ("many", "is no value"), ("0", "batch")):
        batch.fill(given)
        twice(fields.get_by_role("button"))
        expect(page.get_by_role("alert").filter(has_text=refusal)).not_to_have_count(0)
    assert api.status()["control"]["aggregation"] == {}
    batch.fill("2")
    twice(fields.get_by_role("button"))
    expect(page.locator(".events")).to_contain_text(
        'aggregation.policy = "quorum", aggregation.batch = 2, by admin-token'
    )
    expect(page.locator(".facts").first).to_contain_text("quorum")
    assert api.status()["control"]["aggregation"] == {"policy": "quorum", "batch": 2}
    # Another one begins with its own values; what is chosen and not set stays as it is chosen.
    policy.select_option("ssp")
    expect(batch).to_have_value("")
    api.http.patch(api.path(), json={"aggregation": {"batch": 3}})
    expect(page.locator(".events")).to_contain_text("aggregation.batch = 3")
    policy.select_option("quorum")
    expect(batch).to_have_value("3")
    policy.select_option("ssp")
    fields.get_by_label("slack").fill("4")
    twice(fields.get_by_role("button"))
    expect(page.locator(".facts").first).to_contain_text("ssp")
    assert api.status()["control"]["aggregation"] == {"policy": "ssp", "batch": None, "slack": 4}
    # What somebody else sets is shown.
    api.http.patch(api.path(), json={"aggregation": {"policy": "ringmaster", "max_staleness": 8}})
    expect(policy).to_have_value("ringmaster")
    expect(fields.get_by_label("max_staleness")).to_have_value("8")


def test_the_rate_of_a_wrapped_optimizer_is_set(api: Api, open_page: OpenPage) -> None:
    api.create(optimizer={"algorithm": "schedule_free_wrapper", "base": {"algorithm": "sgd", "lr": 0.5}})
    page = open_page(api.url, f"#/runs/{api.run}")
    setting = page.locator(".setting", has=page.get_by_label("base.lr"))
    setting.get_by_role("textbox").fill("0.25")
    twice(setting.get_by_role("button"))
    expect(page.locator(".events")).to_contain_text("optimizer.base.lr = 0.25")
    assert api.status()["control"]["optimizer"]["base"]["lr"] == 0.25


def test_a_workers_lease_is_ended(api: Api, open_page: OpenPage) -> None:
    api.create()
    for worker in ("<b>one</b>/x", "two"):
        api.lease(worker)
    page = open_page(api.url, f"#/runs/{api.run}")
    twice(page.get_by_role("button", name="End: <b>one</b>/x"))
    expect(row_of(page, "<b>one</b>/x")).to_have_attribute("data-state", "ended")
    assert [worker["worker"] for worker in api.status()["workers"]] == ["two"]
    api.lease("<b>one</b>/x")
    twice(page.get_by_role("button", name="Ban 1 h: two"))
    expect(row_of(page, "two")).to_have_attribute("data-state", "ended")
    assert slug(api.http.post(api.path("/leases"), json={"worker": "two"})) == "worker-suspended"
    expect(page.locator(".refused")).to_contain_text("two gets no lease, for 59 min")
    twice(page.get_by_role("button", name="Lift: two"))
    expect(page.locator(".refused")).not_to_contain_text("two")
    api.lease("two")


def test_what_is_refused_is_said(api: Api, open_page: OpenPage) -> None:
    api.create()
    page = open_page(api.url, f"#/runs/{api.run}")
    page.get_by_label("Number of shards").fill("300")
    shards = page.locator("section", has=page.get_by_role("heading", name="Shards and their owners"))
    shards.get_by_role("button").click()
    shards.get_by_role("button").click()
    expect(page.get_by_role("alert").filter(has_text="shards")).to_be_visible()
    assert api.status()["shards"] == 1


def test_a_run_is_deleted_and_its_page_left(api: Api, open_page: OpenPage) -> None:
    run_id = api.create().json()["id"]
    page = open_page(api.url, f"#/runs/{api.run}")
    # Its status has come.
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.get_by_role("button", name="Delete the run").click()
    with page.expect_request(lambda request: request.method == "DELETE") as asked:
        page.get_by_role("button", name=f"Delete {api.run}").click()
    # Another run may have the name by then, and that one is not on the page.
    assert asked.value.url.endswith(f"{api.path()}?id={run_id}")
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    expect(page.get_by_role("link", name=api.run)).to_have_count(0)


def test_who_may_only_read_is_offered_no_acts(api: Api, open_page: OpenPage) -> None:
    api.create()
    api.lease()
    made = api.http.post("/v1/tokens", json={"name": "reader", "scope": "read", "runs": api.run}).json()
    page = open_page(api.url, signs_in=False)
    page.get_by_label("Token").fill("nonsense")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("a token is fst_")
    page.get_by_label("Token").fill(made["token"])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name=api.run).click()
    expect(row_of(page, "worker")).to_be_visible()
    expect(page.locator("button.act")).to_have_count(0)
    # And not even this, once the token is revoked.
    api.http.delete(f"/v1/tokens/{made['id']}")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("its token is good no more")
