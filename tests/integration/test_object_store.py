"""Runs in a bucket of an S3 server: whole, gone on with, and refused by a line."""

import socket

import boto3
import fsspec
import pytest
from command import TINY, call
from moto.server import ThreadedMotoServer

from dlops_dist.engine.run_folder import RunFolder

SETTINGS = [*TINY, "--local", "--epochs", "2", "--name", "run"]


@pytest.fixture(scope="module")
def server():
    """URL of a server with one bucket."""
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        url = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-west-1",
                            "AWS_ENDPOINT_URL": url}.items():  # fmt: skip
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
        fsspec.filesystem("s3").clear_instance_cache()
        yield url
        server.stop()


def train(shards, runs, *arguments):
    return call("train", "q1", "--data.shards", shards, "--runs-dir", runs, *SETTINGS, *arguments)


def buckets():
    return [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]


def test_a_run_in_a_bucket_is_that_in_a_folder_and_goes_on(server, shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path)
    assert code == 0, output
    code, output = train(shapes_shards, "s3://bucket/runs")
    assert code == 0, output
    there, here = RunFolder("s3://bucket/runs/run"), RunFolder(tmp_path / "run")
    assert there.checkpoints.steps() == here.checkpoints.steps()
    name = f"step-{here.checkpoints.steps()[-1]:09d}.pt"
    ours, theirs = (run.folder / "checkpoints" for run in (there, here))
    whole = theirs.open(name).read()
    assert ours.open(name).read() == whole
    ours.delete(name)
    code, output = train(shapes_shards, "s3://bucket/runs")
    assert (code, " from step " in output) == (0, True), output
    assert ours.open(name).read() == whole


@pytest.mark.parametrize("bucket", ["bukcet", "Not_A_Bucket"])
def test_a_bucket_that_is_not_there_is_one_line_and_none_is_made(bucket, server, shapes_shards):
    code, output = train(shapes_shards, f"s3://{bucket}/runs")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith(f"error: runs_dir: s3://{bucket}/runs/run cannot be ")
    assert buckets() == ["bucket"]


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_one_line(server, shapes_shards, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*closed.getsockname()))
        fsspec.filesystem("s3").clear_instance_cache()
        code, output = train(shapes_shards, "s3://bucket/runs")
    fsspec.filesystem("s3").clear_instance_cache()
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "s3://bucket/runs" in output
