"""The page of examples/app.py: what it draws, what it refuses, and how it works in a real browser and as a Space."""

import base64
import html
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from packaging.requirements import Requirement
from PIL import Image

import app
from diffusers_dualrate import DualRatePipeline, DualRateScheduler
from diffusers_dualrate.flops import plan_flops

ROOT = Path(__file__).parents[1]
NAMES = {0: "a", 1: "b & c", 2: "<d>", 3: "e"}
DEFAULTS = {"id2label": NAMES, "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture
def models(make_pipe, tmp_path):
    """Folders of a pair, a heavy network alone, and a student, which has learned guidance."""
    make_pipe(num_context_steps=2, **DEFAULTS).save_pretrained(tmp_path / "pair")
    make_pipe(single_rate=True, **DEFAULTS).save_pretrained(tmp_path / "heavy")
    make_pipe(num_context_steps=1, **DEFAULTS | {"guidance_scale": 1.0}).save_pretrained(tmp_path / "student")
    return tmp_path


def draw(models, **given):
    """What the page shows, step by step, as (message, result)."""
    values = {
        **{"model": f"{models}/pair", "compare": f"{models}/heavy", "labels": ["b & c", "<d>"], "n": 4, "k": 2},
        **{"guidance_scale": 2.0, "solver": app.OWN, "heavy_runs": app.ALIKE, "images_per_class": 1, "seed": 5},
    }
    return [(message["value"], result) for message, result in app.draw(**values | given)]


def sides_of(result):
    """The images of each side of a result, and its figures by their names."""
    for card in re.findall(r'<section class="card" data-share.*?</section>', result, re.DOTALL):
        files = [base64.b64decode(source) for source in re.findall(r"base64,([^\"]*)", card)]
        tiles = dict((name, value) for value, name in re.findall(r"<b>(.*?)</b><span>(.*?)</span>", card))
        yield [Image.open(io.BytesIO(file)).tobytes() for file in files], tiles


def expected(folder, seeds=(5, 6), **steps):
    pipe = DualRatePipeline.from_pretrained(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [image.tobytes() for image in pipe([1, 2], generator=generators, **steps).images]


def test_both_sides_end_with_the_images_of_their_pipelines_and_show_each_step_before(models):
    shown = draw(models)
    assert all(message is None for message, _ in shown)
    assert len(shown) == 4 + 4 + 1
    seen = {tuple(images) for _, result in shown for images, _ in sides_of(result)}
    assert len(seen) == 4 + 4
    (pair, tiles), (heavy, heavy_tiles) = sides_of(shown[-1][1])
    assert pair == expected(models / "pair") and heavy == expected(models / "heavy")
    assert (tiles["heavy evaluations"], tiles["light evaluations"]) == ("2", "4")
    assert (heavy_tiles["heavy evaluations"], heavy_tiles["light evaluations"]) == ("4", "0")


def test_the_page_says_what_an_image_costs_and_draws_the_plan(models):
    result = draw(models, n=40, k=8)[-1][1]
    pipe = DualRatePipeline.from_pretrained(models / "pair")
    plan = pipe.plan_run(40, 8)
    (_, tiles), (_, heavy) = sides_of(result)
    flops = plan_flops(pipe.denoiser, pipe.context_encoder, plan, guided=[True] * 40)
    assert tiles["GFLOP per image"] == f"{flops / 1e9:.2f}" != heavy["GFLOP per image"]
    assert html.escape(str(plan)) in result and "&lt;d&gt;" in result and "<d>" not in result
    assert re.search(r"The pair took <b>[\d.]+ times (less|more) compute</b> and <b>[\d.]+ times", result)


def test_guidance_costs_only_where_it_acts(models):
    pipe = DualRatePipeline.from_pretrained(models / "pair")
    pipe.register_to_config(guidance_interval=(100.0, 101.0))  # nowhere
    pipe.save_pretrained(models / "unguided")
    ((_, tiles),) = sides_of(draw(models, model=f"{models}/unguided", compare="", n=40)[-1][1])
    assert (
        tiles["GFLOP per image"] == f"{plan_flops(pipe.denoiser, pipe.context_encoder, pipe.plan_run(40)) / 1e9:.2f}"
    )


def test_empty_fields_are_the_models_own_values(models):
    (pair, _), _ = sides_of(draw(models, n=None, k=None, guidance_scale=None)[-1][1])
    assert pair == expected(models / "pair")


def test_the_models_own_plan_runs_while_n_and_k_are_its_own(models):
    """Mutant: the K of the page is passed on, which spreads the refreshes anew."""
    pair = DualRatePipeline.from_pretrained(models / "pair", refresh_steps=[0, 1])
    pair.save_pretrained(models / "planned")
    *values, _, _ = app.choose(f"{models}/planned", "")
    shown = {"n": values[2]["value"], "k": values[3]["value"]}
    assert shown == {"n": 4, "k": 2}
    ((images, _),) = sides_of(result := draw(models, model=f"{models}/planned", compare="", **shown)[-1][1])
    assert images == expected(models / "planned") != expected(models / "pair")
    assert html.escape(str(pair.plan_run())) in result


def test_a_student_keeps_its_guidance_and_the_heavy_network_its_own(models):
    *values, runs, message = app.choose(f"{models}/student", f"{models}/heavy")
    assert [each.get("value") for each in values] == [["a", "b & c", "<d>", "e"], None, 4, 1, 1.0, app.OWN]
    assert runs == app.ITS_OWN and message["visible"] is False
    result = draw(models, model=f"{models}/student", guidance_scale=1.0, n=2, k=1, heavy_runs=runs)[-1][1]
    (student, _), (heavy, _) = sides_of(result)
    steps = {"num_inference_steps": 2, "num_context_steps": 1, "guidance_scale": 1.0}
    assert student == expected(models / "student", **steps) and heavy == expected(models / "heavy")
    assert app.choose(f"{models}/pair", f"{models}/heavy")[-2] == app.ALIKE


@pytest.mark.filterwarnings("ignore")
def test_every_solver_draws_something_else(models):
    ends = {solver: next(sides_of(draw(models, solver=solver)[-1][1]))[0] for solver in app.SOLVERS}
    assert ends[app.OWN] == ends[app.ANCESTRAL]
    assert ends[app.ANCESTRAL] != ends[app.SECOND_ORDER] != ends[app.FAST] != ends[app.ANCESTRAL]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"k": 5}, "num_context_steps must be between 1 and num_inference_steps=4, got 5."),
        ({"n": 0}, "num_inference_steps must be an integer in"),
        ({"guidance_scale": 0.5}, "guidance_scale must be a finite number of at least 1, got 0.5."),
        ({"seed": -1}, "Seed must be a whole number between 0 and 9007199254740991, got -1."),
        ({"seed": None}, "Seed must be a whole number between 0 and 9007199254740991, got None."),
        ({"labels": []}, "Classes must name at least one."),
        ({"labels": None}, "Classes must name at least one."),
        ({"labels": ["a", "x"]}, "Classes must be among those of the model, got &#x27;x&#x27;."),
        ({"images_per_class": 0}, "Images of each must be at least 1, got 0."),
        ({"images_per_class": 17}, "There may be at most 32 images, got 34."),
        ({"model": "{}/nothing"}, "nothing cannot be loaded: there is no such folder."),
        ({"model": None}, "A model is loaded by the name of a folder"),
        ({"model": "{}/heavy"}, "heavy is a single-rate model."),
        ({"compare": "{}/pair"}, "pair is a pair whose encoder predicts nothing."),
        ({"compare": "{}/other"}, "other has other classes than the pair, or the same in another order."),
    ],
)
def test_a_wrong_value_shows_a_sentence_and_leaves_the_images(models, make_pipe, given, sentence):
    make_pipe(single_rate=True, id2label=dict.fromkeys(NAMES, "z")).save_pretrained(models / "other")
    given = {name: value.format(models) if isinstance(value, str) else value for name, value in given.items()}
    ((message, result),) = draw(models, **given)
    assert sentence in message and 'role="alert"' in message and "Traceback" not in message
    assert result == app.gr.skip()
    if "model" in given:
        assert app.choose(given["model"], f"{models}/heavy")[-1]["value"] == message


def test_a_network_of_diffusers_draws_beside_a_pair_though_its_classes_have_no_names(models, tmp_path):
    pair = app.open_pair(f"{models}/pair")
    size, channels, classes = (pair.denoiser.config[name] for name in ("sample_size", "in_channels", "num_classes"))
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(size, channels, channels, num_class_embeds=classes, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    heavy = app.open_heavy(str(tmp_path), pair)
    assert isinstance(app.with_solver(heavy, app.FAST).scheduler, DPMSolverMultistepScheduler)
    with pytest.raises(ValueError, match=r"own\" or 'DPM-Solver\+\+' for a model that is saved with DDPMScheduler"):
        app.with_solver(heavy, app.SECOND_ORDER)


def test_a_model_of_text_draws_the_prompts_of_the_page(make_text_pipe, tmp_path):
    make_text_pipe(num_context_steps=2, guidance_scale=2.0).save_pretrained(tmp_path / "pair")
    pipe = DualRatePipeline.from_pretrained(tmp_path / "pair")
    classes, prompts, *_ = app.own_values(pipe)
    assert prompts == {"visible": True} and not classes["visible"]
    options = {"compare": "", "labels": [], "images_per_class": 2}
    result = draw(tmp_path, prompts="a red apple\n\n two fish \n", **options)[-1][1]
    ((images, _),) = sides_of(result)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
    expected = pipe(["a red apple", "two fish"], generator=generators, num_images_per_prompt=2).images
    assert images == [image.tobytes() for image in expected] and "<figcaption>two fish</figcaption>" in result
    ((message, _),) = draw(tmp_path, prompts=" ", **options)
    assert "Prompts must name at least one" in message


def test_a_model_without_classes_draws_as_many_images_as_asked(make_pipe, tmp_path):
    make_pipe(num_classes=None).save_pretrained(tmp_path / "pair")
    pipe = DualRatePipeline.from_pretrained(tmp_path / "pair")
    assert app.own_values(pipe)[0] == {"choices": [], "value": [], "visible": False}
    result = draw(tmp_path, compare="", labels=[], images_per_class=3, guidance_scale=4.0)[-1][1]
    ((images, _),) = sides_of(result)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    assert images == [image.tobytes() for image in pipe(None, 4, 2, batch_size=3, generator=generators).images]


def test_the_clock_stands_while_the_page_is_drawn_and_who_leaves_stops_the_chain(make_pipe, watch, monkeypatch):
    """Kills: a clock that is not started anew; an interrupt that is never set."""
    now, pipe = [0.0], make_pipe()
    monkeypatch.setattr(app.time, "perf_counter", lambda: now[0])
    for _, seconds in app.run_chain(pipe, class_labels=0, num_inference_steps=3, num_context_steps=1):
        assert seconds == 0
        now[0] += 100
    calls = watch(pipe)
    chain = app.run_chain(pipe, class_labels=0, num_inference_steps=50, num_context_steps=1)
    next(chain)
    chain.close()
    assert len(calls.denoiser) == 1


def test_latents_are_shown_as_the_images_that_they_stand_for(make_networks):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, **blocks)
    encoder, denoiser = make_networks(in_channels=4)
    pipe = DualRatePipeline(denoiser, DualRateScheduler(clip_sample=False), encoder, vae=vae.eval())
    call = {"num_inference_steps": 2, "num_context_steps": 1}
    *_, (images, _) = app.run_chain(pipe, generator=torch.Generator().manual_seed(1), **call)
    expected = pipe(generator=torch.Generator().manual_seed(1), **call).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert images[0].size == (16, 16)


def test_an_error_within_a_chain_reaches_the_page(make_pipe):
    with pytest.raises(ValueError, match="class_labels must lie in 0..3, got 9"):
        list(app.run_chain(make_pipe(), class_labels=9))


def test_the_space_names_what_it_runs_with():
    header, text = re.fullmatch(
        r"---\n(.*?)---\n(.*)", (ROOT / "examples/space/README.md").read_text(), re.DOTALL
    ).groups()
    header = yaml.safe_load(header)
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {header["colorFrom"], header["colorTo"]} <= colours and header["sdk"] == "gradio"
    assert len(header["short_description"]) <= 60 and len(header["emoji"]) == 1 and text.strip()
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={header['sdk_version']}" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert header["license"] == project["license"].lower()
    assert f":: {header['python_version']}" in " ".join(project["classifiers"])
    floor, *others = project["optional-dependencies"]["app"]
    assert Requirement(floor).specifier.contains(header["sdk_version"])
    required = (ROOT / "examples/space/requirements.txt").read_text().split()
    assert {*project["dependencies"], *others} < set(required)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """Address of the Space's page, served from the folder that `make space` makes, as the Hub would run it."""
    folder = tmp_path_factory.mktemp("space") / "space"
    subprocess.run(["make", "space", f"SPACE={folder}"], cwd=ROOT, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    header = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with open(folder / "log", "w") as log:
        command = [sys.executable, header["app_file"], "--port", str(port)]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                app.time.sleep(0.5)
        yield address
    finally:
        server.kill()
        server.wait()
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def browser(tmp_path):
    """A headless browser that reaches this machine alone."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver, in Debian the packages chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1000",
                 "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"user-data-dir={tmp_path}/user"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.mark.slow
def test_the_space_draws_in_a_browser_and_shows_a_sentence_for_a_wrong_value(browser, space):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(condition):
        return WebDriverWait(browser, 90).until(condition)

    def find(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def enter(control, value):
        (field,) = find(f"#{control} input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.ENTER, Keys.TAB)

    def ends():
        """The images once both chains are through, or None: the page may replace them while they are read."""
        script = (
            "return [document.querySelectorAll('#result .card[data-share=\"1\"]').length,"
            " [...document.querySelectorAll('#result img')].map(each => each.src), document.querySelector('#result .sum')?.innerText]"
        )
        done, images, sentence = browser.execute_script(script)
        return images if done == 2 and sentence else None

    browser.get(space)
    first = wait(lambda _: ends())
    assert len(first) == 16 == len(set(first))
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('#result img')].map(i => [i.naturalWidth, i.clientWidth, getComputedStyle(i).imageRendering])"
    )
    assert all(natural == 64 and shown > 64 and how == "pixelated" for natural, shown, how in sizes)
    assert "N = 12, K = 4" in find("#result pre")[0].text

    enter("contexts", "99")
    find("#draw")[0].click()
    sentence = "num_context_steps must be between 1 and num_inference_steps=12, got 99."
    assert wait(lambda _: [each.text for each in find("#message .wrong")]) == [sentence]
    assert ends() == first

    enter("contexts", "3")
    enter("seed", "7")
    find("#draw")[0].click()
    second = wait(lambda _: (ends() or first) != first and ends())
    assert not set(second) & set(first) and not find("#message .wrong")
    assert "N = 12, K = 3" in find("#result pre")[0].text

    enter("model", "no/such/model")
    wait(
        lambda _: (
            [each.text for each in find("#message .wrong")]
            == ["no/such/model cannot be loaded: there is no such folder."]
        )
    )

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(space) for url in asked)
    assert not [url for url in asked if url.startswith("http") and not url.startswith(space)]
