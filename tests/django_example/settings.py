"""Django's settings: plain WSGI, nothing of the relay's but the secret that both know."""

import os

from psycopg2.extensions import parse_dsn

DSN = parse_dsn(os.environ["EXAMPLE_DSN"])
# What the relay reads from --jwt-key-file.
STREAM_KEY_FILE = os.environ["EXAMPLE_KEY_FILE"]
# nginx serves the streams at the site's own address.
STREAM_HOST = ""

SECRET_KEY = "of an example that runs on this machine alone"
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
# nginx ends TLS in front.
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
ROOT_URLCONF = "urls"
WSGI_APPLICATION = None
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": DSN["dbname"],
        "USER": DSN["user"],
        "PASSWORD": DSN.get("password", ""),
        "HOST": DSN["host"],
        "PORT": DSN["port"],
        "ATOMIC_REQUESTS": True,
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "static/"
LOGIN_REDIRECT_URL = LOGOUT_REDIRECT_URL = "/"
USE_TZ = True
