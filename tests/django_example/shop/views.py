# shop/views.py
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.db import connection, transaction
from django.shortcuts import render

from shop.models import Order
from shop.streams import LIFETIME, tenants_of


@transaction.non_atomic_requests
@login_required
def orders(request):
    tenants = tenants_of(request.user)
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        cursor.execute("SELECT sse_relay.position()")
        (position,) = cursor.fetchone()
        found = list(Order.objects.filter(tenant_id__in=tenants).order_by("id"))
    channels = [f"tenant-{tenant}" for tenant in tenants]
    stream = {"channels": channels, "position": position, "lifetime": LIFETIME, "host": settings.STREAM_HOST}
    return render(request, "shop/orders.html", {"orders": found, "stream": stream})
