// Many pages at once in Node, each as the docs write it. Arguments: the module, the stream's address, how many.
// Each fetch of the state is a line of JSON.
import { createRequire } from "node:module";

const { EventSource } = createRequire(`${process.cwd()}/`)("eventsource");
Object.assign(globalThis, { EventSource, location: "http://127.0.0.1/" });
const [module, url, count] = process.argv.slice(2);
const { openStream, spread } = await import(module);

for (let page = 0; page < Number(count); page++) {
  const refetch = ({ reason }) => console.log(JSON.stringify({ page, reason, when: Date.now() }));
  openStream(url, { onGap: spread(refetch) });
}
