"""Orders of tenants. A trigger publishes each change: whoever makes it, and by whatever program."""

from django.db import models


class Order(models.Model):
    tenant_id = models.IntegerField()
    item = models.CharField(max_length=100)
    state = models.CharField(max_length=20, default="new")

    def __str__(self) -> str:
        return f"{self.item} of tenant {self.tenant_id}: {self.state}"
