"""A page of orders, its stream's cookie, Django's own login and admin."""

from django.contrib import admin
from django.urls import include, path

from shop.streams import SignOut, stream_cookie
from shop.views import orders

urlpatterns = [
    path("", orders),
    path("stream-cookie", stream_cookie),
    path("accounts/logout/", SignOut.as_view()),
    path("accounts/", include("django.contrib.auth.urls")),
    path("admin/", admin.site.urls),
]
