# shop/migrations/0002_sse_relay.py
from pathlib import Path

from django.db import migrations

SCHEMA = Path(__file__).with_name("sse_relay.sql").read_text()
TRIGGER = """
CREATE TRIGGER publish AFTER INSERT OR UPDATE OR DELETE ON shop_order
    FOR EACH ROW EXECUTE FUNCTION sse_relay.publish_row('tenant-{tenant_id}', 'item', 'state')
"""
GRANTS = """
GRANT USAGE ON SCHEMA sse_relay TO relay;
GRANT SELECT ON sse_relay.settings, sse_relay.epoch, sse_relay.events, sse_relay.revocations TO relay;
GRANT EXECUTE ON FUNCTION
    sse_relay.attach(text, bigint), sse_relay.waiting(pg_snapshot, bigint),
    sse_relay.advance(xid8[], int[], boolean), sse_relay.prune()
    TO relay;
"""


class Migration(migrations.Migration):
    atomic = False  # the script opens a transaction of its own
    dependencies = [("shop", "0001_initial")]
    operations = [
        migrations.RunSQL(SCHEMA, "DROP SCHEMA sse_relay CASCADE"),
        migrations.RunSQL(GRANTS, migrations.RunSQL.noop),
        migrations.RunSQL(TRIGGER, "DROP TRIGGER publish ON shop_order"),
    ]
