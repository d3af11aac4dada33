"""What is saved here appears on the pages of others."""

from django.contrib import admin

from shop.models import Order

admin.site.register(Order)
