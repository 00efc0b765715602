"""The Lambda function, under AWS's own runtime client, and what brings it to AWS."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import torch
from aws_emulator import REGION, Emulator
from conftest import REPOSITORY, run_stage_command
from pictures import encode, jpeg, scene, with_scans
from PIL import Image
from test_classifier import pictures

import data
import generate_trace_model
import image_files
from model import ResNet50Wrapper
from utils import MEAN, STD, Config, UserError

sys.path.insert(0, str(REPOSITORY / "scripts"))
sys.path.insert(0, str(REPOSITORY / "scripts/aws"))

import function
import lambda_runtime
from lambda_runtime import post

CLASSES = 1000
CODE = (
    REPOSITORY / "lambda_deploy/handler.py",
    *(REPOSITORY / "gradio_deploy" / name for name in ("classifier.py", "decoder.py")),
)
LAMBDA_START_S = 10  # how long Lambda lets a function start, with a whole CPU
METADATA = {
    "format": 1,
    "name": "tiny",
    "classes": [f"n{number:08d}" for number in range(CLASSES)],
    "labels": [f"label {number}" for number in range(CLASSES)],
    "input_px": 224,
    "resize_px": 256,
    "mean": list(MEAN),
    "std": list(STD),
    "resize_rule": generate_trace_model.RESIZE_RULE,
    "weights": "best",
    "weights_sha256": "0" * 64,
    "epoch": 1,
    "val_top1": 50.0,
    "val_top5": 100.0,
    "val_images": 12,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What Lambda unpacks: the handler and a ResNet-50 as the export stage leaves it."""
    folder = tmp_path_factory.mktemp("task")
    torch.manual_seed(0)
    model = ResNet50Wrapper(CLASSES).eval()
    shown = torch.stack([torch.from_numpy(validation_pixels(c)) for c in pictures().values()])
    with torch.no_grad():  # so that pictures, and mix-ups, differ in their likeliest classes
        logits = model(data.normalize(shown))
        scale = 2 / logits.std(dim=0).mean()
        model.model.fc.bias.copy_(scale * (model.model.fc.bias - logits.mean(dim=0)))
        model.model.fc.weight *= scale
    export = generate_trace_model.as_onnx(model, METADATA["input_px"], METADATA)
    generate_trace_model.write_export(folder, {"onnx": export}, METADATA, [])
    for code in CODE:
        shutil.copy(code, folder)
    for absent in ("torch", "torchvision", "cv2", "simplejpeg"):
        (folder / f"{absent}.py").write_text(f"raise ImportError('Lambda has no {absent}')\n")
    yield folder
    shutil.rmtree(folder)


def started(
    task: Path, **variables: str
) -> contextlib.AbstractContextManager[lambda_runtime.Runtime]:
    """The function under awslambdaric, from when its process starts."""
    return lambda_runtime.started(task, [sys.executable], variables)


def cpu_s(process: subprocess.Popen) -> float:
    """CPU time of a process and of those that it started: what else runs here adds little."""
    root = psutil.Process(process.pid)
    times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def in_json(**fields: Any) -> dict[str, Any]:
    return post(json.dumps(fields), kind="application/json")


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def validation_pixels(content: bytes) -> np.ndarray:
    """What validation shows the model of a picture: uint8 (224, 224, 3)."""
    config = Config(val_px=METADATA["input_px"], val_resize_px=METADATA["resize_px"])
    out = np.empty((config.val_px, config.val_px, 3), np.uint8)
    data.fill_val(config, image_files.encoded(content), 0, out)
    return out


def test_its_answers_are_the_exported_models(
    task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = onnxruntime.InferenceSession(task / "model.onnx", providers=["CPUExecutionProvider"])
    likeliest = set()
    with started(task) as runtime:
        times_ms = []
        for name, content in pictures().items():
            asked = time.perf_counter()
            status, answer = runtime.ask(post(content))
            times_ms.append(1e3 * (time.perf_counter() - asked))
            if len(times_ms) == 1:
                start_s = cpu_s(runtime.function)
            assert (status, answer["model"]) == (200, "tiny"), name
            images = data.normalize(torch.from_numpy(validation_pixels(content))[None])
            (logits,) = session.run(["logits"], {"images": images.contiguous().numpy()})
            expected = torch.from_numpy(logits[0]).softmax(dim=0)
            likeliest.add(int(expected.argmax()))
            top = answer["predictions"]
            assert len(top) == 5
            for prediction, best in zip(top, expected.topk(5).values.tolist(), strict=True):
                index = METADATA["classes"].index(prediction["class"])
                assert prediction["label"] == METADATA["labels"][index]
                # Pillow and validation's decoder differ by up to one grey level.
                assert prediction["probability"] == pytest.approx(
                    expected[index].item(), rel=0.03
                ), name
                assert prediction["probability"] == pytest.approx(best, rel=0.03), name
            assert 0 < answer["time_ms"] <= times_ms[-1] + 1
        wide = pictures()["wide"]
        expected = runtime.ask(post(wide))[1]["predictions"]
        wrapped = base64.encodebytes(wide).decode()  # in lines, as the command base64 prints it
        for event in (
            in_json(image=in_base64(wide)),
            post(json.dumps({"image": wrapped}).encode()),
            {"image": in_base64(wide)},
        ):
            assert runtime.ask(event)[1]["predictions"] == expected
    assert len(likeliest) > 1
    assert 0 < start_s < LAMBDA_START_S
    with capsys.disabled():
        warm_ms = sorted(times_ms[1:])[len(times_ms) // 2]
        print(f"\nLambda: first answer after {start_s:.2f} s of CPU, then one in {warm_ms:.0f} ms")


def test_it_has_a_thread_for_each_cpu_that_its_memory_brings(task: Path) -> None:
    threads = []
    for memory_mb in (512, 1769, 3538, 10_240):
        with started(task, AWS_LAMBDA_FUNCTION_MEMORY_SIZE=str(memory_mb)) as runtime:
            assert runtime.ask(post(pictures()["wide"]))[0] == 200
            threads.append(psutil.Process(runtime.function.pid).num_threads())
    assert [count - threads[0] for count in threads] == [0, 0, 1, 5]


def test_bad_requests_get_a_sentence(task: Path) -> None:
    photo = jpeg(scene(120, 160))
    bomb = encode(Image.new("1", (10_000, 5_001)), "PNG")
    line = encode(Image.new("L", (5000, 1)), "PNG")
    cases = [
        (post(photo, "GET"), 405, "Send a picture with POST."),
        (post(photo, "PUT"), 405, "Send a picture with POST."),
        (post(b""), 400, "There is no picture"),
        ({**post(photo), "body": None}, 400, "There is no picture"),
        (post("  \n"), 400, "There is no picture"),
        (post("{no json"), 400, "not valid JSON"),
        (post('{"a":' * 100_000), 400, "not valid JSON"),
        (in_json(), 400, 'JSON must have either "image"'),
        (in_json(image=7), 400, 'JSON must have either "image"'),
        (in_json(image="", s3_key="a"), 400, 'JSON must have either "image"'),
        (in_json(image="äöü"), 400, "not valid base64"),
        (in_json(image="abc"), 400, "not valid base64"),
        (in_json(image=""), 400, "The picture is empty."),
        (in_json(image="A" * 28_000_000), 413, "more than 20 MB"),
        (in_json(s3_key="a.jpg"), 400, "reads no bucket"),
        (post("hello"), 415, "not a picture that can be read"),
        (post("\ud800"), 415, "not a picture that can be read"),
        (post(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 415, "not a picture"),
        (post(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), 415, "HEIC"),
        (post(photo[: len(photo) // 2]), 422, "damaged or incomplete"),
        (post(bomb), 413, "more than 50 million pixels"),
        (post(line), 422, "100 times as long as wide"),
        (post(with_scans(65)), 422, "too many scans"),
        ({"requestContext": {"elb": {}}, "body": "x"}, 400, "no event of a function URL"),
        ({"requestContext": None}, 400, "no event of a function URL"),
        ({**post(photo), "body": {"image": "x"}}, 400, "no event of a function URL"),
        ({}, 400, 'JSON must have either "image"'),
        ("hello", 400, 'JSON must have either "image"'),
        (None, 400, 'JSON must have either "image"'),
    ]
    with started(task) as runtime:
        for event, status, words in cases:
            found, answer = runtime.ask(event)
            assert (found, list(answer)) == (status, ["error"]), (words, answer)
            assert words in answer["error"]
            assert "\n" not in answer["error"]
        assert runtime.ask(post(photo))[0] == 200
        runtime.events.put(post(photo, "GET"))
        _, answer = runtime.answers.get(timeout=lambda_runtime.ANSWER_LIMIT_S)
        assert answer["headers"] == {"content-type": "application/json", "allow": "POST"}


def test_pictures_of_one_bucket(task: Path, aws_account: Emulator) -> None:
    photo = jpeg(scene(120, 160))
    url = aws_account.environment["AWS_ENDPOINT_URL"]
    variables = {
        key: value for key, value in aws_account.environment.items() if key.startswith("AWS_")
    }
    import boto3

    s3 = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="AKIAtestonly",
        aws_secret_access_key="wJalrXUtnFEMIsecret",
    )
    for bucket in ("mine", "other"):
        s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket="mine", Key="holiday/1 ü.jpg", Body=photo)
    s3.put_object(Bucket="mine", Key="large", Body=b"\0" * (20 * 2**20 + 1))
    s3.put_object(Bucket="other", Key="secret.jpg", Body=photo)
    with started(task, **variables, IMAGE_BUCKET="mine", AWS_MAX_ATTEMPTS="1") as runtime:
        _, expected = runtime.ask(post(photo))
        status, answer = runtime.ask(in_json(s3_key="holiday/1 ü.jpg"))
        assert (status, answer["predictions"]) == (200, expected["predictions"])
        for key in ("nothing", "../other/secret.jpg", "secret.jpg"):
            assert runtime.ask(in_json(s3_key=key))[0] == 404
        assert runtime.ask(in_json(s3_key="large"))[0] == 413
        for key in ("", "a" * 1025, "\ud800"):
            assert runtime.ask(in_json(s3_key=key))[0] == 400
        # Another fault is one of the function, which Lambda logs.
        aws_account.fail("GetObject", "InternalError", times=0)
        with pytest.raises(UserError, match="InternalError"):
            runtime.ask(in_json(s3_key="holiday/1 ü.jpg"))
        aws_account.heal()
        aws_account.fail("GetObject", "AccessDenied")
        status, answer = runtime.ask(in_json(s3_key="holiday/1 ü.jpg"))
        assert (status, "may not read it" in answer["error"]) == (404, True)


BOTO3 = """
class Body:
    def read(self, *_):
        raise RuntimeError("the object is read")

class Client:
    def get_object(self, **_):
        return {"ContentLength": 20 * 2**20 + 1, "Body": Body()}

def client(_):
    return Client()
"""


def test_an_object_that_is_too_large_is_not_read(task: Path, tmp_path: Path) -> None:
    (tmp_path / "boto3.py").write_text(BOTO3)
    with started(task, IMAGE_BUCKET="mine", PYTHONPATH=str(tmp_path)) as runtime:
        status, answer = runtime.ask(in_json(s3_key="a film"))
        assert (status, "more than 20 MB" in answer["error"]) == (413, True)
        # A key's limit is one of bytes, not of letters.
        status, answer = runtime.ask(in_json(s3_key="ü" * 513))
        assert (status, "1 to 1,024 bytes" in answer["error"]) == (400, True)


def test_json_may_be_indented_and_base64_has_no_other_signs(task: Path) -> None:
    photo = in_base64(jpeg(scene(120, 160)))
    with started(task) as runtime:
        indented = post(b"\n  " + json.dumps({"image": photo}).encode())
        assert runtime.ask(indented)[0] == 200
        for text in (f"data:image/jpeg;base64,{photo}", "%%%%"):
            status, answer = runtime.ask(in_json(image=text))
            assert (status, answer["error"]) == (400, "The picture is not valid base64.")


def test_another_model_is_refused_at_the_start(task: Path, tmp_path: Path) -> None:
    for name in ("handler.py", "classifier.py", "decoder.py", "model.json"):
        shutil.copy(task / name, tmp_path)
    content = bytearray((task / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    with started(tmp_path) as runtime:
        path, answer = runtime.answers.get(timeout=20)
    assert path.endswith("/runtime/init/error")
    assert "model.onnx is not the file that model.json describes" in answer["errorMessage"]


# ------------------------------------------------------------------------------ to AWS and back


@pytest.fixture
def emulator(quick_aws_account: Emulator, tmp_path: Path) -> Emulator:
    """An empty account, and packages that pip can fetch without a network."""
    quick_aws_account.environment["PIP_NO_INDEX"] = "1"
    quick_aws_account.environment["PIP_FIND_LINKS"] = str(tmp_path / "wheels")
    return quick_aws_account


@pytest.fixture
def command(emulator: Emulator, tmp_path: Path) -> Callable[..., str]:
    """scripts/aws/function.py in that account; its output, stderr where it must fail."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "onnxruntime", "1.99.0", "cp313-cp313-manylinux_2_28_x86_64", "tools/a.py")
    make_wheel(wheels, "numpy", "2.99.0", "cp313-cp313-manylinux_2_27_x86_64", "core/tests/a.py")
    make_wheel(wheels, "pillow", "12.99.0", "cp313-cp313-manylinux_2_28_x86_64", "a.pyi")
    export = tmp_path / "runs/first/export"
    export.mkdir(parents=True)
    write_model(export, b"the model")

    def run(*arguments: object, code: int = 0) -> str:
        runs = ("--name", "first", "--runs-folder", tmp_path / "runs")
        runs = runs if arguments[0] == "deploy" else ()
        done = run_stage_command(
            "scripts/aws/function.py", *arguments, *runs, env=emulator.environment
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return run


def make_wheel(folder: Path, name: str, version: str, tag: str, extra: str) -> None:
    """A wheel with a module, and with a file that Lambda needs nothing of."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"'''{name}'''\n",
        f"{name}/{extra}": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        for path, content in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, content)


def write_model(export: Path, content: bytes) -> None:
    (export / "model.onnx").write_bytes(content)
    described = {"onnx": {"file": "model.onnx", "sha256": hashlib.sha256(content).hexdigest()}}
    (export / "model.json").write_text(json.dumps({**METADATA, "formats": described}))


def aws(emulator: Emulator, *arguments: str) -> Any:
    done = subprocess.run(
        ["aws", *arguments], env=emulator.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null")


def changes(emulator: Emulator) -> list[str]:
    """What was changed since the last look."""
    reading = ("Describe", "Get", "List", "Head")
    actions = [call["action"] for call in emulator.calls()]
    emulator.clear()
    return [action for action in actions if not action.startswith(reading)]


def assert_waited_for(emulator: Emulator, *actions: str) -> None:
    """After these, AWS takes no other change for a while: the next question is how far it is."""
    calls = [call for call in emulator.calls() if not call.get("code")]
    names = [call["action"] for call in calls]
    for action in actions:
        (place,) = (place for place, name in enumerate(names) if name == action)
        assert names[place + 1] == "GetFunction", names


NAME = ("--function-name", "resnet50-imagenet")


def test_the_life_of_a_function(
    emulator: Emulator, command: Callable[..., str], tmp_path: Path
) -> None:
    shown = command("deploy", "--dry-run", "--public")
    assert "lambda create-function" in shown
    # 0.2 s of 1,769 MB at $0.0000166667 a GB and second, and $0.0000002 a request.
    assert "1,000 requests of 0.2 s about $0.0060. Everybody who knows its address" in shown
    assert changes(emulator) == []

    # Broken off where the package lies in the bucket: the same command goes on.
    emulator.fail("CreateFunction", "AccessDeniedException")
    assert "lack a permission" in command("deploy", "--yes", code=2)
    (bucket,) = aws(emulator, "s3api", "list-buckets")["Buckets"]
    stored = tmp_path / "stored.zip"
    aws(
        emulator, "s3api", "get-object", "--bucket", bucket["Name"], "--key", "function.zip",
        str(stored),
    )  # fmt: skip
    with zipfile.ZipFile(stored) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert content["model.onnx"] == b"the model"
    for code in CODE:
        assert content[code.name] == code.read_bytes()
    modules = {"numpy/__init__.py", "onnxruntime/__init__.py", "pillow/__init__.py"}
    assert modules | {"model.json"} <= set(content)
    assert not [name for name in content if name.endswith(("/a.py", ".pyi"))]

    changes(emulator)
    late = "The role defined for the function cannot be assumed by Lambda."
    emulator.fail("CreateFunction", "InvalidParameterValueException", late)
    shown = command("deploy", "--yes", "--image-bucket", "photos")
    assert "Lambda does not know the role yet" in shown
    assert_waited_for(emulator, "CreateFunction")
    assert changes(emulator) == [
        *("PutRolePolicy", "PutObject", "CreateFunction", "CreateFunction", "DeleteObject"),
        "CreateFunctionUrlConfig",
    ]
    function = aws(emulator, "lambda", "get-function", *NAME)
    has = function["Configuration"]
    assert (has["Runtime"], has["Handler"]) == ("python3.13", "handler.handler")
    assert (has["MemorySize"], has["Timeout"]) == (1769, 30)
    assert has["Environment"]["Variables"] == {"IMAGE_BUCKET": "photos"}
    assert has["CodeSha256"] == in_base64(hashlib.sha256(stored.read_bytes()).digest())
    url = aws(emulator, "lambda", "get-function-url-config", *NAME)
    assert (url["AuthType"], url["FunctionUrl"] in shown) == ("AWS_IAM", True)
    policy = aws(
        emulator, "iam", "get-role-policy", "--role-name", "resnet50-imagenet-lambda-us-east-1",
        "--policy-name", "function",
    )["PolicyDocument"]  # fmt: skip
    account = aws(emulator, "sts", "get-caller-identity")["Account"]
    lines = f"arn:aws:logs:us-east-1:{account}:log-group:/aws/lambda/resnet50-imagenet:*"
    assert [(one["Action"], one["Resource"]) for one in policy["Statement"]] == [
        (["logs:CreateLogStream", "logs:PutLogEvents"], lines),
        ("s3:GetObject", "arn:aws:s3:::photos/*"),
    ]
    (role,) = aws(emulator, "iam", "list-roles")["Roles"]
    assert has["Role"] == role["Arn"]
    assert [one["Principal"] for one in role["AssumeRolePolicyDocument"]["Statement"]] == [
        {"Service": "lambda.amazonaws.com"}
    ]
    (log,) = aws(emulator, "logs", "describe-log-groups")["logGroups"]
    assert (log["logGroupName"], log["retentionInDays"]) == ("/aws/lambda/resnet50-imagenet", 30)

    changes(emulator)
    command("deploy", "--yes", "--image-bucket", "photos")
    assert changes(emulator) == []
    write_model(tmp_path / "runs/first/export", b"a better one")
    command("deploy", "--yes", "--public", "--memory-mb", 3538, "--max-concurrency", 5)
    made = emulator.calls()
    assert_waited_for(emulator, "UpdateFunctionCode", "UpdateFunctionConfiguration")
    assert changes(emulator) == [
        *("PutRolePolicy", "PutObject", "UpdateFunctionCode", "DeleteObject"),
        *("UpdateFunctionConfiguration", "CreateFunctionConcurrency"),
        *("AddPermission", "AddPermission", "UpdateFunctionUrlConfig"),
    ]
    assert aws(emulator, "lambda", "get-function-url-config", *NAME)["AuthType"] == "NONE"
    permissions = [call["params"] for call in made if call["action"] == "AddPermission"]
    assert [
        tuple(one.get(key) for key in ("Action", "FunctionUrlAuthType", "InvokedViaFunctionUrl"))
        for one in permissions
    ] == [
        ("lambda:InvokeFunctionUrl", "NONE", None),
        ("lambda:InvokeFunction", None, True),
    ]
    command("deploy", "--yes")
    assert changes(emulator) == [
        "UpdateFunctionConfiguration",  # not the limit, which is taken away when that is asked for
        *("RemovePermission", "RemovePermission", "UpdateFunctionUrlConfig"),
    ]
    command("deploy", "--yes", "--max-concurrency", 0)
    assert changes(emulator) == ["DeleteFunctionConcurrency"]
    command("deploy", "--yes", "--image-bucket", "photos")
    assert changes(emulator) == ["PutRolePolicy", "UpdateFunctionConfiguration"]
    has = aws(emulator, "lambda", "get-function", *NAME)["Configuration"]
    assert has["Environment"]["Variables"] == {"IMAGE_BUCKET": "photos"}

    assert "deletes:" in command("remove", "--dry-run")
    assert "nobody is there to ask" in command("remove", code=2)
    assert changes(emulator) == []
    assert "no function" in command("remove", "--yes", "--region", "eu-west-1")  # nor its role
    assert len(aws(emulator, "iam", "list-roles")["Roles"]) == 1
    assert command("remove", "--yes").endswith("all gone\n")
    assert aws(emulator, "lambda", "list-functions")["Functions"] == []
    assert aws(emulator, "iam", "list-roles")["Roles"] == []
    assert aws(emulator, "s3api", "list-buckets")["Buckets"] == []
    assert aws(emulator, "logs", "describe-log-groups")["logGroups"] == []
    assert "there is no function" in command("remove", "--yes")


def test_a_limit_that_the_account_may_not_reserve_is_refused_before_anything_is_changed(
    emulator: Emulator, command: Callable[..., str]
) -> None:
    """New accounts have a quota of 10 or 50, of which AWS lets nothing be reserved."""
    emulator.set(concurrency=10)
    said = command("deploy", "--yes", "--public", "--max-concurrency", 1, code=2)
    assert "max_concurrency is 1: of this account's quota of 10 in us-east-1 AWS lets none" in said
    assert "leave the option out (the quota limits the price too)" in said
    assert "--quota-code L-B99A9384 --desired-value 1000 --region us-east-1" in said
    assert changes(emulator) == []
    command("deploy", "--yes", "--public")
    changes(emulator)
    assert "lets none be" in command("deploy", "--yes", "--max-concurrency", 1, code=2)
    assert changes(emulator) == []
    command("deploy", "--yes", "--public", "--max-concurrency", 0)
    assert changes(emulator) == []

    emulator.set(concurrency=110)
    said = command("deploy", "--yes", "--public", "--max-concurrency", 11, code=2)
    assert "of 110 in us-east-1 AWS lets at most 10 be reserved" in said
    for limit in (4, 10):  # what the function has reserved already does not count against it
        command("deploy", "--yes", "--public", "--max-concurrency", limit)
        assert changes(emulator) == ["CreateFunctionConcurrency"]
    assert "at most 10 be" in command("deploy", "--yes", "--max-concurrency", 11, code=2)
    assert changes(emulator) == []


@pytest.mark.parametrize("project", ["resnet50-imagenet", f"{20 * 'A'}-{19 * 'b'}"])
@pytest.mark.parametrize("region", ["us-east-1", "ap-southeast-1", "ap-southeast-2"])
def test_each_region_has_a_bucket_of_its_own_for_the_package(project: str, region: str) -> None:
    aws = types.SimpleNamespace(region_name=region, read=lambda *_: {"Account": "123456789012"})
    *_, bucket = function.where(aws, function.Settings(project=project))
    assert re.fullmatch(function.BUCKET, bucket)
    assert bucket.endswith(f"-123456789012-{region}") and bucket[:10] == project[:10].lower()


def test_what_cannot_be_deployed(
    emulator: Emulator, command: Callable[..., str], tmp_path: Path
) -> None:
    export = tmp_path / "runs/first/export"
    (export.parent / "best.pt").write_bytes(b"better weights")
    said = "best.pt is not what was exported: python3 generate_trace_model.py --name first"
    assert said in command("deploy", code=2)
    (export.parent / "best.pt").unlink()
    (export / "model.onnx").write_bytes(b"another")
    assert "is not the file that model.json describes" in command("deploy", code=2)
    described = (export / "model.json").read_text()
    for wrong, said in {
        "[]": "is not of format 1",
        described.replace('"format": 1', '"format": 0'): "is not of format 1",
        described.replace('"labels"', '"labelz"'): "model.json has no labels: python3 generate_",
    }.items():
        (export / "model.json").write_text(wrong)
        assert said in command("deploy", code=2)
    for option, value, said in (
        ("--memory-mb", 1535, "memory_mb is 1535: it must be 1,536 to 10,240"),
        ("--memory-mb", 10_241, "memory_mb is 10241: it must be 1,536 to 10,240"),
        ("--max-concurrency", -1, "max_concurrency is -1: it must be 0 or more"),
    ):
        assert said in command("deploy", option, value, code=2)
    for bucket in ("s3://my-bucket", "my-bucket/holiday", "*"):
        said = f"image_bucket is '{bucket}': it must be a bucket's name alone"
        assert said in command("deploy", "--image-bucket", bucket, code=2)
    (export / "model.onnx").unlink()
    assert "python3 generate_trace_model.py --name first" in command("deploy", code=2)
    with open(export / "model.onnx", "wb") as file:
        file.truncate(250 * 2**20)
    with open(export / "model.onnx", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    (export / "model.json").write_text(
        json.dumps(METADATA | {"formats": {"onnx": {"file": "model.onnx", "sha256": digest}}})
    )
    assert "deploy a container image" in command("deploy", code=2)
    write_model(export, b"the model")
    (tmp_path / "wheels").rename(tmp_path / "elsewhere")
    assert "pip cannot fetch the packages" in command("deploy", code=2)
    aws(
        emulator, "iam", "create-role", "--role-name", "resnet50-imagenet-lambda-us-east-1",
        "--assume-role-policy-document", "{}",
    )  # fmt: skip
    assert "without the tag resnet50-project" in command("remove", code=2)
    assert changes(emulator) == ["CreateRole"]


def test_what_a_broken_off_deployment_left_is_removed_too(
    emulator: Emulator, command: Callable[..., str]
) -> None:
    emulator.fail("CreateFunction", "AccessDeniedException")
    command("deploy", "--yes", code=2)
    (bucket,) = aws(emulator, "s3api", "list-buckets")["Buckets"]
    stored = aws(emulator, "s3api", "list-objects-v2", "--bucket", bucket["Name"])["Contents"]
    assert [one["Key"] for one in stored] == ["function.zip"]
    shown = command("remove", "--yes")
    assert "function resnet50-imagenet\n" not in shown and shown.endswith("all gone\n")
    assert aws(emulator, "iam", "list-roles")["Roles"] == []
    assert aws(emulator, "s3api", "list-buckets")["Buckets"] == []
    assert aws(emulator, "logs", "describe-log-groups")["logGroups"] == []


def test_in_another_region_its_bucket_lies_there_and_goes_too(
    emulator: Emulator, command: Callable[..., str]
) -> None:
    """And a log whose name begins like the function's is not its own."""
    region = ("--region", "eu-west-1")
    other = ("logs", "create-log-group", "--log-group-name", "/aws/lambda/resnet50-imagenet-2")
    aws(emulator, *other, *region)
    shown = command("deploy", "--yes", *region)
    assert "curl --aws-sigv4 aws:amz:eu-west-1:lambda --user KEY_ID:SECRET_KEY " in shown
    (bucket,) = aws(emulator, "s3api", "list-buckets")["Buckets"]
    place = aws(emulator, "s3api", "get-bucket-location", "--bucket", bucket["Name"])
    assert place["LocationConstraint"] == "eu-west-1"
    logs = ("logs", "describe-log-groups", *region, "--query", "logGroups[].logGroupName")
    assert aws(emulator, *logs) == [f"/aws/lambda/resnet50-imagenet{end}" for end in ("", "-2")]
    assert command("remove", "--yes", *region).endswith("all gone\n")
    assert aws(emulator, "s3api", "list-buckets")["Buckets"] == []
    assert aws(emulator, *logs) == ["/aws/lambda/resnet50-imagenet-2"]
    assert "there is no function" in command("remove", "--yes", *region)


def test_a_bucket_of_another_account_gets_no_package(
    emulator: Emulator, command: Callable[..., str]
) -> None:
    role = ("--role-arn", "arn:aws:iam::111111111111:role/theirs", "--role-session-name", "theirs")
    keys = aws(emulator, "sts", "assume-role", *role)["Credentials"]
    theirs = {
        "AWS_ACCESS_KEY_ID": keys["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": keys["SecretAccessKey"],
        "AWS_SESSION_TOKEN": keys["SessionToken"],
    }
    account = aws(emulator, "sts", "get-caller-identity")["Account"]
    bucket = ("--bucket", f"resnet50-imagenet-{account}-{REGION}")
    them = dataclasses.replace(emulator, environment={**emulator.environment, **theirs})
    aws(them, "s3api", "create-bucket", *bucket)
    for arguments in (("deploy", "--yes"), ("remove", "--yes")):
        said = "Forbidden (403): the bucket is not yours"
        assert said in command(*arguments, code=2)
    assert aws(them, "s3api", "list-objects-v2", *bucket).get("KeyCount", 0) == 0
    assert not emulator.calls("PutObject") and not emulator.calls("CreateFunction")


def test_a_function_of_somebody_else_is_left_alone(
    emulator: Emulator, command: Callable[..., str], tmp_path: Path
) -> None:
    role = aws(
        emulator, "iam", "create-role", "--role-name", "theirs", "--assume-role-policy-document",
        "{}",
    )["Role"]["Arn"]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "theirs.zip", "w") as archive:
        archive.writestr("handler.py", "")
    aws(
        emulator, "lambda", "create-function", *NAME, "--runtime", "python3.13", "--role", role,
        "--handler", "handler.handler", "--zip-file", f"fileb://{tmp_path}/theirs.zip",
    )  # fmt: skip
    changes(emulator)
    for arguments in (("deploy", "--yes"), ("remove", "--yes")):
        said = "there is a function resnet50-imagenet without the tag resnet50-project: set another"
        assert said in command(*arguments, code=2)
    assert changes(emulator) == []
