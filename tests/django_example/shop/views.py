"""The page: the orders of one moment, and the position from which their stream goes on."""

from django.contrib.auth.decorators import login_required
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from shop.models import Order
from shop.streams import LIFETIME, tenants_of


# The isolation level can be set only before a transaction's first query, and the login's own come first.
@transaction.non_atomic_requests
@login_required
def orders(request: HttpRequest) -> HttpResponse:
    tenants = tenants_of(request.user)
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor.execute("SELECT sse_relay.position()")
        (position,) = cursor.fetchone()
        # A list: a queryset would ask only while the page is rendered.
        found = list(Order.objects.filter(tenant_id__in=tenants).order_by("id"))
    page = {
        "orders": found,
        "channels": [f"tenant-{tenant}" for tenant in tenants],
        "position": position,
        "lifetime": LIFETIME,
    }
    return render(request, "shop/orders.html", page)
