"""The table, and the trigger that publishes its rows: two columns, to the channel of their tenant."""

from django.db import migrations, models

TRIGGER = """
CREATE TRIGGER publish_order AFTER INSERT OR UPDATE OR DELETE ON shop_order
    FOR EACH ROW EXECUTE FUNCTION sse_relay.publish_row('tenant-{tenant_id}', 'item', 'state')
"""


class Migration(migrations.Migration):
    operations = [
        migrations.CreateModel(
            "Order",
            [
                ("id", models.BigAutoField(primary_key=True)),
                ("tenant_id", models.IntegerField()),
                ("item", models.CharField(max_length=100)),
                ("state", models.CharField(default="new", max_length=20)),
            ],
        ),
        migrations.RunSQL(TRIGGER, "DROP TRIGGER publish_order ON shop_order"),
    ]
