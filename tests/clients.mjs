// npm's eventsource in Node, which loads it from the current folder.
// Argument: {"NAME OF THE CLIENT": "URL", …}. Each thing that happens is a line of JSON.
import { createRequire } from "node:module";

const { EventSource } = createRequire(`${process.cwd()}/`)("eventsource");

for (const [client, url] of Object.entries(JSON.parse(process.argv[2]))) {
  const tell = (what) => console.log(JSON.stringify({ client, ...what }));
  const source = new EventSource(url);
  source.onerror = () => tell({ name: "error", data: String(source.readyState), id: "" });
  for (const name of ["message", "paid", "relay.gap", "relay.refused"])
    source.addEventListener(name, ({ data, lastEventId }) => tell({ name, data, id: lastEventId }));
}
