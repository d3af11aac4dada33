"""The examples of docs/publishing.md, each run by its own program: Django, Rails, Laravel, PHP."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psycopg2.extensions
import pytest

import harness
from harness import Database, require, wait_until
from pages import block

DJANGO = """
import json, os, sys, types
from unittest.mock import MagicMock
import django
from django.conf import settings
from django.db import connection
names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
parts = json.loads(os.environ["CONNECTION"])
database = {key: parts[name] for key, name in names.items()}
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **database}})
django.setup()
sys.modules["shop"] = types.ModuleType("shop")
sys.modules["shop.models"] = models = types.ModuleType("shop.models")
from django.db.models import Model, TextField
class Order(Model):
    state = TextField()
    class Meta:
        app_label, db_table = "shop", "orders"
models.Order = Order
import payments
payments.pay(7)
"""
RAILS = """
require "active_record"
require "json"
parts = JSON.parse(ENV.fetch("CONNECTION"))
ActiveRecord::Base.establish_connection(adapter: "postgresql", **parts.transform_keys(&:to_sym))
class ApplicationRecord < ActiveRecord::Base
  self.abstract_class = true
end
require "./order"
Order.find(7).pay
"""
LARAVEL = """<?php
namespace App\\Models {
    require 'Illuminate/Database/autoload.php';
    class Order extends \\Illuminate\\Database\\Eloquent\\Model { public $timestamps = false; }
}
namespace {
    $parts = json_decode(getenv('CONNECTION'), true);
    $capsule = new Illuminate\\Database\\Capsule\\Manager;
    $capsule->addConnection([
        'driver' => 'pgsql', 'charset' => 'utf8', 'host' => $parts['host'], 'port' => $parts['port'],
        'database' => $parts['dbname'], 'username' => $parts['user'], 'password' => $parts['password'],
    ]);
    $capsule->bootEloquent();
    $app = new Illuminate\\Container\\Container;
    $app->instance('db', $capsule->getDatabaseManager());
    Illuminate\\Support\\Facades\\Facade::setFacadeApplication($app);
    function response() { return new class { public function noContent() {} }; }
    require './PayController.php';
    (new App\\Http\\Controllers\\PayController)(7);
}
"""
PHP_CONNECTION = "new PDO('pgsql:host=localhost;dbname=app', 'app', 'password')"
PHP_OWN = """(function () {
    $parts = json_decode(getenv('CONNECTION'), true);
    $dsn = "pgsql:host={$parts['host']};port={$parts['port']};dbname={$parts['dbname']}";
    return new PDO($dsn, $parts['user'], $parts['password']);
})()"""


PHP = block("php", "<?php\n// pay.php")
# The program, its own script, and the file of the docs beside it.
EXAMPLES: dict[str, tuple[str, str, str, str]] = {
    "django": (sys.executable, DJANGO, "payments.py", block("python", "# shop/payments.py")),
    "rails": ("ruby", RAILS, "order.rb", block("ruby", "# app/models/order.rb")),
    "laravel": ("php", LARAVEL, "PayController.php", block("php", "<?php\n// app/Http")),
    "php": ("php", "<?php require './pay.php';", "pay.php", PHP.replace(PHP_CONNECTION, PHP_OWN)),
}


@pytest.mark.slow
@pytest.mark.parametrize("language", EXAMPLES)
@pytest.mark.parametrize("source", ["notify", "log"])
def test_the_example_publishes(source: str, language: str, log_database: Database, tmp_path: Path) -> None:
    program, script, name, text = EXAMPLES[language]
    publish = {"notify": "pg_notify", "log": "sse_relay.publish"}[source]
    assert text.count("sse_relay.publish") == 1
    (tmp_path / name).write_text(text.replace("sse_relay.publish", publish))
    (tmp_path / "script").write_text(script)
    log_database.execute("CREATE TABLE orders (id bigint PRIMARY KEY, state text)")
    log_database.execute("INSERT INTO orders VALUES (7, 'new')")
    with contextlib.closing(log_database.connect()) as listener:
        listener.cursor().execute("LISTEN orders")
        connection = json.dumps(psycopg2.extensions.parse_dsn(log_database.dsn))
        env = {**harness.clean_environment(), "CONNECTION": connection}
        done = subprocess.run(
            [require(program), "script"],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert log_database.execute("SELECT state FROM orders") == [("paid",)]
        if source == "log":
            found = log_database.execute("SELECT channel, data FROM sse_relay.pending")
        else:
            wait_until(lambda: listener.poll() or listener.notifies, 10, "the notification")
            found = [(notify.channel, notify.payload) for notify in listener.notifies]
    assert [(channel, json.loads(data)) for channel, data in found] == [("orders", {"id": 7})]
