# shop/models.py
from django.db import models


class Order(models.Model):
    tenant_id = models.IntegerField(null=True)
    item = models.CharField(max_length=100)
    state = models.CharField(default="new", max_length=20)

    def __str__(self):
        return f"{self.item}: {self.state}"
