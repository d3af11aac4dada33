"""Who may read which channels: a token in a cookie that scripts cannot read."""

import time
from pathlib import Path

import jwt
from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser, User
from django.contrib.auth.views import LogoutView
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.views.decorators.cache import never_cache

# A line end at the end of the file is not part of the secret; to the relay neither.
KEY = Path(settings.STREAM_KEY_FILE).read_bytes().rstrip(b"\r\n")
LIFETIME = 600  # seconds; who is shut out reads on for no longer


def tenants_of(user: AbstractBaseUser | AnonymousUser) -> list[int]:
    """Give the tenants whose orders a user may see: his groups are called by their numbers."""
    if not isinstance(user, User):
        return []
    names = user.groups.values_list("name", flat=True)
    return sorted(int(name) for name in names if name.isdigit())


@never_cache
def stream_cookie(request: HttpRequest) -> HttpResponse:
    if not request.user.is_authenticated:
        response = HttpResponse(status=401)
        response.delete_cookie("sse", path="/events", samesite="Strict")
        return response
    claims = {
        "sub": str(request.user.pk),
        "channels": [f"tenant-{tenant}" for tenant in tenants_of(request.user)],
        "exp": int(time.time()) + LIFETIME,
    }
    response = HttpResponse(status=204)
    response.set_cookie(
        "sse",
        jwt.encode(claims, KEY, algorithm="HS256"),
        max_age=LIFETIME,
        path="/events",
        secure=True,
        httponly=True,
        samesite="Strict",
    )
    return response


def forget_cookie(request: HttpRequest) -> HttpResponseBase:
    """Sign out. A stream that is open ends with its token, at the latest after `LIFETIME`."""
    response = LogoutView.as_view()(request)
    response.delete_cookie("sse", path="/events", samesite="Strict")
    return response
