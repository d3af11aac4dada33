# shop/streams.py
import time
from pathlib import Path

import jwt
from django.conf import settings
from django.contrib.auth.signals import user_logged_out
from django.contrib.auth.views import LogoutView
from django.db import connection
from django.dispatch import receiver
from django.http import HttpResponse
from django.views.decorators.cache import never_cache

# The relay has the same file as --jwt-key-file. The line end is not part of the secret.
KEY = Path(settings.STREAM_KEY_FILE).read_bytes().rstrip(b"\r\n")
LIFETIME = 600  # seconds
COOKIE = {"key": "sse", "path": "/events", "samesite": "Strict"}


def tenants_of(user):
    """Return the tenants whose orders a user may see: the groups are named after them."""
    return sorted(int(name) for name in user.groups.values_list("name", flat=True) if name.isdigit())


@never_cache
def stream_cookie(request):
    if not request.user.is_authenticated:
        response = HttpResponse(status=401)
        response.delete_cookie(**COOKIE)
        return response
    now = time.time()
    channels = [f"tenant-{tenant}" for tenant in tenants_of(request.user)]
    claims = {"sub": str(request.user.pk), "channels": channels, "iat": now, "exp": int(now) + LIFETIME}
    token = jwt.encode(claims, KEY, algorithm="HS256")
    response = HttpResponse(status=204)
    response.set_cookie(value=token, max_age=LIFETIME, secure=True, httponly=True, **COOKIE)
    return response


@receiver(user_logged_out)
def end_streams(user, **kwargs):
    if user:
        with connection.cursor() as cursor:
            cursor.execute("SELECT sse_relay.revoke(%s)", [str(user.pk)])


class SignOut(LogoutView):
    def post(self, request, *args, **kwargs):
        response = super().post(request, *args, **kwargs)
        response.delete_cookie(**COOKIE)
        return response
