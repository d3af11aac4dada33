# shop/tests.py
from django.contrib.auth.models import User
from django.db import connection
from django.test import TestCase, TransactionTestCase

from shop.models import Order


class OrderTest(TestCase):
    def test_a_new_order_is_published(self):
        order = Order.objects.create(tenant_id=7, item="tea")
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT data::jsonb->'key'->>'id' FROM sse_relay.pending"
                " WHERE xid = pg_current_xact_id() AND channel = 'tenant-7'"
            )
            self.assertEqual(cursor.fetchall(), [(str(order.pk),)])


class PageTest(TransactionTestCase):
    def test_the_page_shows_an_order_and_its_position(self):
        user = User.objects.create_user("ann")
        user.groups.create(name="7")
        self.client.force_login(user)
        Order.objects.create(tenant_id=7, item="tea")
        page = self.client.get("/")
        self.assertContains(page, "tea: new")
        self.assertRegex(page.context["stream"]["position"], r"^\w+-\d+@")
