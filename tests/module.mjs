// The client module without a browser: a fake EventSource, and a clock that only the stories move.
// Arguments: the module's path, the name of a story.
import assert from "node:assert/strict";

const { openStream, spread } = await import(process.argv[2]);

// ==== The world ===============================================================

let now = 0;
let timers = [];
let number = 0;
globalThis.setTimeout = (work, ms = 0, ...given) => {
  timers.push({ id: ++number, when: now + ms, work: () => work(...given) });
  return number;
};
globalThis.clearTimeout = (id) => {
  timers = timers.filter((timer) => timer.id !== id);
};
const settle = () => new Promise((resolve) => setImmediate(resolve));
// Let seconds pass.
async function pass(seconds) {
  const end = now + 1000 * seconds;
  for (;;) {
    await settle();
    const next = timers.filter((timer) => timer.when <= end).sort((a, b) => a.when - b.when)[0];
    if (!next) break;
    now = Math.max(now, next.when);
    clearTimeout(next.id);
    next.work();
  }
  now = end;
}

class FakeEventSource extends EventTarget {
  static CLOSED = 2;
  static made = [];
  readyState = 0;
  constructor(url, { withCredentials }) {
    super();
    Object.assign(this, { url: new URL(url), withCredentials, when: now / 1000 });
    assert.ok(FakeEventSource.made.every((other) => other.readyState === 2), "two streams at once");
    FakeEventSource.made.push(this);
  }
  close() {
    this.readyState = 2;
  }
  send(name, data, lastEventId = "") {
    const text = typeof data === "string" ? data : JSON.stringify(data);
    if (this.readyState !== 2) this.dispatchEvent(new MessageEvent(name, { data: text, lastEventId }));
  }
  opened() {
    if (this.readyState === 2) return;
    this.readyState = 1;
    this.dispatchEvent(new Event("open"));
  }
  // The browser comes back by itself, or never.
  failed(forGood) {
    this.readyState = forGood ? 2 : 0;
    this.dispatchEvent(new Event("error"));
  }
}
globalThis.EventSource = FakeEventSource;
globalThis.location = "https://app.example/page";
const made = FakeEventSource.made;
const last = () => made.at(-1);
const gap = (reason) => ({ channels: ["orders"], reason, since: null });
const positions = (source) => source.url.searchParams.getAll("lastEventId");

// What a page has seen, by handler.
function open(options = {}) {
  const told = [];
  const tell = (what) => (argument) => told.push([what, argument?.data ?? argument?.reason]);
  const on = { message: tell("message"), open: tell("open"), error: tell("error") };
  const stream = openStream("/events/orders", {
    on, onGap: tell("gap"), onRefused: tell("refused"), ...options,
  });
  return { stream, told };
}

// Open a stream that is live, with heartbeats every so many seconds.
function live(interval, options) {
  const opened = open(options);
  last().opened();
  last().send("relay.gap", gap("start"), "e-1");
  last().send("relay.heartbeat", { interval }, "e-1");
  return opened;
}

const between = (value, least, most) => assert.ok(least <= value && value <= most, `${value}: ${least} to ${most}`);
const expired = { status: 401, reason: "the token has expired" };

// ==== The stories =============================================================

const stories = {
  async asksForHeartbeats() {
    const { told } = live(15, { position: "e-0@1:2:", withCredentials: true });
    assert.equal(String(last().url), "https://app.example/events/orders?heartbeat=event&lastEventId=e-0%401%3A2%3A");
    assert.equal(last().withCredentials, true);
    assert.deepEqual(told, [["open", undefined], ["gap", "start"]]);
  },

  async leavesALiveStreamAlone() {
    live(15);
    for (let beat = 0; beat < 100; beat++) {
      await pass(15);
      last().send("relay.heartbeat", { interval: 15 }, `e-${beat}`);
    }
    assert.equal(made.length, 1);
  },

  async opensAnewAtItsPositionWhenHeartbeatsAreMissing() {
    for (const interval of [15, 1, 60]) {
      const { stream } = live(interval, { position: "e-0@1:2:" });
      const began = now / 1000;
      last().send("relay.heartbeat", { interval }, "e-7");
      const { length } = made;
      await pass(2.4 * interval);
      assert.equal(made.length, length);
      await pass(2 * interval);
      assert.equal(made.length, length + 1);
      between(last().when - began, 2.5 * interval, 2.75 * interval);
      assert.deepEqual(positions(last()), ["e-0@1:2:", "e-7"]);
      stream.close();
    }
  },

  async pagesDoNotOpenAnewInOneMoment() {
    const delays = new Set();
    for (let page = 0; page < 20; page++) {
      const { stream } = live(15);
      const [began, { length }] = [now / 1000, made];
      while (made.length === length) await pass(0.05);
      delays.add((last().when - began).toFixed(2));
      stream.close();
    }
    assert.ok(delays.size > 10, [...delays]);
  },

  async aRelayWithoutHeartbeatsIsLeftAlone() {
    open();
    last().opened();
    last().send("message", "1", "e-1");
    await pass(3600);
    assert.equal(made.length, 1);
  },

  async aConnectionThatIsNeverAnsweredIsTriedAgain() {
    open();
    await pass(45);
    assert.equal(made.length, 2);
  },

  async theBrowsersOwnReturnIsNotDisturbed() {
    live(15);
    last().failed(false);
    await pass(140);
    assert.equal(made.length, 1);
    await pass(30);
    assert.equal(made.length, 2);
  },

  async comesBackAfterAnErrorThatIsFinalForTheBrowser() {
    live(15);
    const waits = [];
    for (let attempt = 0; attempt < 8; attempt++) {
      const [failed, { length }] = [now / 1000, made];
      last().failed(true);
      while (made.length === length) await pass(0.25);
      waits.push(last().when - failed);
      assert.deepEqual(positions(last()), ["e-1"]);
    }
    for (const [attempt, wait] of waits.entries()) {
      const least = Math.min(2 ** (attempt + 1), 60);
      between(wait, least, 1.5 * least);
    }
    last().opened();
    last().send("message", "1", "e-2");
    const failed = now / 1000;
    last().failed(true);
    await pass(4);
    between(last().when - failed, 2, 3);
  },

  async aRefusalIsFinalUntilItIsOpenedAgain() {
    const { stream, told } = live(15);
    last().send("relay.refused", { status: 403, reason: "no" }, "");
    await pass(3600);
    assert.equal(made.length, 1);
    assert.deepEqual(told.at(-1), ["refused", "no"]);
    stream.open();
    assert.deepEqual(positions(last()), ["e-1"]);
  },

  async renewsBeforeTheFirstOpeningAndAfterEach401() {
    let renewed = 0;
    const { told } = open({ renew: async () => ++renewed });
    assert.equal(made.length, 0);
    await pass(0);
    assert.deepEqual([renewed, made.length], [1, 1]);
    last().opened();
    last().send("relay.gap", gap("start"), "e-5");
    const refused = now / 1000;
    last().send("relay.refused", expired);
    await pass(5);
    assert.deepEqual([renewed, made.length], [2, 2]);
    between(last().when - refused, 2, 3);
    assert.deepEqual(positions(last()), ["e-5"]);
    assert.deepEqual(told.filter(([what]) => what === "refused"), []);
  },

  async aRenewalThatFailsIsTriedAgain() {
    let renewed = 0;
    const { told } = open({
      renew: () => {
        if (++renewed < 4) throw new Error("502");
        return true;
      },
    });
    await pass(30);
    assert.deepEqual([renewed, made.length, told.length], [4, 1, 0]);
  },

  async refusalsAfterRenewalsComeFurtherAndFurtherApart() {
    let renewed = 0;
    open({ renew: () => ++renewed });
    for (let second = 0; second < 3600; second++) {
      await pass(1);
      last().opened();
      last().send("relay.refused", expired);
    }
    // 2 s, 4 s, … and then once in 60 to 90 s.
    between(renewed, 40, 70);
    assert.ok(now / 1000 - last().when < 95, "it has given up");
  },

  async whoIsSignedOutIsTold() {
    let signedIn = true;
    const { told } = open({ renew: () => signedIn });
    await pass(0);
    signedIn = false;
    last().send("relay.refused", expired);
    await pass(3600);
    assert.deepEqual(told, [["refused", "the token has expired"]]);
  },

  async aStreamThatIsClosedStaysClosed() {
    let answer;
    const { stream } = open({ renew: () => new Promise((resolve) => (answer = resolve)) });
    await pass(0);
    stream.close();
    answer(true);
    await pass(3600);
    assert.equal(made.length, 0);
    stream.open();
    last().failed(true);
    stream.close();
    await pass(3600);
    assert.equal(made.length, 1);
  },

  async gapsAreSpreadAndFetchedOnce() {
    const fetched = [];
    const onGap = spread(({ reason }) => fetched.push([reason, now / 1000]), 5);
    onGap(gap("start"));
    await pass(0);
    assert.deepEqual(fetched, [["start", 0]]);
    const whens = [];
    for (let page = 0; page < 100; page++) {
      const began = now / 1000;
      onGap(gap("evicted"));
      onGap(gap("restart"));
      await pass(5);
      assert.equal(fetched.length, page + 2);
      whens.push(fetched.at(-1)[1] - began);
    }
    for (let second = 0; second < 5; second++)
      assert.ok(whens.filter((when) => Math.floor(when) === second).length > 5, `none in second ${second}`);
  },
};

if (process.argv[3]) await stories[process.argv[3]]();
else console.log(Object.keys(stories).join("\n"));
