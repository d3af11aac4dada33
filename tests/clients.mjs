// Clients from npm in Node, which load their packages from the current folder.
// Argument: {"NAME OF THE CLIENT": ["KIND", "URL"], …}. Each thing that happens is a line of JSON.
import { createRequire } from "node:module";

const require = createRequire(`${process.cwd()}/`);
const { EventSource } = require("eventsource");
const { default: ReconnectingEventSource } = require("reconnecting-eventsource");

const MAKE = {
  eventsource: (url) => new EventSource(url),
  reconnecting: (url) => new ReconnectingEventSource(url, { eventSourceClass: EventSource }),
};

for (const [client, [kind, url]] of Object.entries(JSON.parse(process.argv[2]))) {
  const tell = (what) => console.log(JSON.stringify({ client, ...what }));
  const source = MAKE[kind.split(" ")[0]](url);
  const onEvent = ({ type, data, lastEventId }) => tell({ name: type, data, id: lastEventId });
  source.onerror = () => tell({ name: "error", data: String(source.readyState), id: "" });
  if (kind.endsWith(" onmessage")) source.onmessage = onEvent;
  else for (const name of ["message", "paid", "relay.gap", "relay.refused"]) source.addEventListener(name, onEvent);
}
