/* Many clients of event streams in one process, fast enough not to be what is measured.

   cc -O2 -o sseload sseload.c
   sseload --port 8008 --clients 1000 --path /events/ch%d

   Opens the streams, takes the chunks off, counts events, and takes their delay from the stamp "t=NUMBER"
   in their data: CLOCK_MONOTONIC of the publisher in nanoseconds, so publisher and client share a machine.
   Writes one JSON object a line: the first when every stream is open (or has failed), one for each "until".

   Commands, one a line on standard input; its end ends the program:
     reset               forget what was counted, and say {} once that is done; events that were stamped before
                         do not count either
     until EVENTS SECS   report once so many events were counted since the reset, or after so many seconds
*/
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 2048, LINE_BYTES = 96, READ_BYTES = 262144, TURN_EVENTS = 1024 };
/* Each has some 28,000 ports. */
enum { CLIENTS_PER_ADDRESS = 10000 };
static const double OPENING_SECONDS = 60;

enum state {
    CONNECTING,
    HEAD,
    PLAIN_BODY,
    CHUNK_SIZE,
    CHUNK_DATA,
    CHUNK_END,
    CLOSED,
};

struct client {
    int fd;
    enum state state;
    bool open;         /* has got all that makes a stream ready */
    bool has_comment;
    bool has_data;     /* of the block that is being read */
    bool is_control;   /* the block is a relay.* event, which no publisher sent */
    uint64_t stamp;    /* of the block's data, 0 if none */
    uint64_t started;
    uint64_t chunk_left;
    unsigned events;   /* since the last reset */
    unsigned head_length;
    size_t line_length;
    char line[LINE_BYTES]; /* the start of a line that is not whole yet; more of it is never needed */
    char *head;
};

static struct {
    int port, clients, channels, inflight, stalled, address_base;
    bool first_comment;
    const char *path, *last_event_id;
} options = {.port = 8008, .clients = 1, .channels = 1, .inflight = 256, .address_base = 1, .path = "/events/ch%d"};

static struct client *clients;
static int poller;
static uint64_t now; /* read once for each recv */
static uint64_t program_start;

/* Over the whole run. */
static int opened, opening, ready, failed, refused;
static uint64_t last_ready;

/* Since the last reset. */
static struct {
    uint64_t since, events, controls, comments, bytes, reads, unstamped, first_stamp, last_arrival;
    int disconnected, stalled_disconnected;
} count;

static uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ==== Histograms: buckets of 1/64 of their value, so quantiles are exact to 1.6 % ==== */

enum { FINE = 64, FINE_BITS = 6, BUCKETS = 64 * FINE };

struct histogram {
    uint64_t bucket[BUCKETS], values, most;
    double sum;
};
static struct histogram delays, openings;

static void add(struct histogram *h, uint64_t value) {
    int shift = value < FINE ? 0 : 63 - __builtin_clzll(value) - FINE_BITS;
    int place = value < FINE ? (int)value : (shift + 1) * FINE + (int)((value >> shift) - FINE);
    h->bucket[place]++;
    h->values++;
    h->sum += (double)value;
    if (value > h->most) h->most = value;
}

/* In milliseconds. */
static double quantile(const struct histogram *h, double share) {
    uint64_t wanted = (uint64_t)(share * (double)h->values), seen = 0;
    for (int place = 0; place < BUCKETS; place++)
        if ((seen += h->bucket[place]) > wanted) {
            int shift = place < FINE ? 0 : place / FINE - 1;
            uint64_t value = place < FINE ? (uint64_t)place : (uint64_t)(place % FINE + FINE) << shift;
            return (double)value / 1e6;
        }
    return (double)h->most / 1e6;
}

/* ==== Reading a stream ==== */

static void become_open(struct client *c) {
    c->open = true;
    ready++;
    opening--;
    last_ready = now;
    add(&openings, now - c->started);
    int number = (int)(c - clients);
    if (number < options.stalled) { /* from here on this one reads nothing */
        struct epoll_event nothing = {.events = 0, .data.u32 = (uint32_t)number};
        epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &nothing);
    }
}

static void count_event(struct client *c) {
    if (c->is_control) {
        count.controls++;
        return;
    }
    if (c->stamp && c->stamp < count.since) return;
    count.events++;
    c->events++;
    count.last_arrival = now;
    if (!c->stamp) {
        count.unstamped++;
        return;
    }
    if (!count.first_stamp || c->stamp < count.first_stamp) count.first_stamp = c->stamp;
    add(&delays, now > c->stamp ? now - c->stamp : 0);
}

static uint64_t read_stamp(const char *data, size_t length) {
    const char *end = data + length;
    const char *at = length > 2 && data[0] == 't' && data[1] == '=' ? data : memmem(data, length, "\"t=", 3);
    if (!at) return 0;
    uint64_t stamp = 0;
    for (at = memchr(at, '=', (size_t)(end - at)) + 1; at < end && *at >= '0' && *at <= '9'; at++)
        stamp = stamp * 10 + (uint64_t)(*at - '0');
    return stamp;
}

/* Take one line without its end; of a long one only the start. */
static void take_line(struct client *c, const char *line, size_t length) {
    if (length && line[length - 1] == '\r') length--;
    if (!length) { /* the end of a block */
        if (c->has_data) count_event(c);
        c->has_data = c->is_control = false;
        c->stamp = 0;
    } else if (line[0] == ':') {
        count.comments++;
        if (!c->has_comment) {
            c->has_comment = true;
            if (!c->open) become_open(c);
        }
    } else if (length >= 5 && !memcmp(line, "data:", 5)) {
        size_t start = length > 5 && line[5] == ' ' ? 6 : 5;
        if (!c->has_data) c->stamp = read_stamp(line + start, length - start);
        c->has_data = true;
    } else if (length >= 13 && !memcmp(line, "event: relay.", 13)) {
        c->is_control = true;
    }
}

static void take_body(struct client *c, const char *bytes, size_t length) {
    while (length) {
        const char *end = memchr(bytes, '\n', length);
        size_t taken = end ? (size_t)(end - bytes) : length;
        if (end && !c->line_length) { /* the common case: a line that came whole */
            take_line(c, bytes, taken);
        } else {
            size_t kept = c->line_length < LINE_BYTES ? c->line_length : LINE_BYTES;
            size_t more = taken < LINE_BYTES - kept ? taken : LINE_BYTES - kept;
            memcpy(c->line + kept, bytes, more);
            c->line_length += taken;
            if (end) {
                c->line_length = 0;
                take_line(c, c->line, kept + more);
            }
        }
        if (!end) return;
        bytes += taken + 1;
        length -= taken + 1;
    }
}

/* Take bytes of the head; return how many of them belonged to it. */
static size_t take_head(struct client *c, const char *bytes, size_t length) {
    if (!c->head) c->head = calloc(1, HEAD_BYTES);
    unsigned before = c->head_length;
    size_t room = HEAD_BYTES - 1 - before;
    memcpy(c->head + before, bytes, length < room ? length : room);
    c->head_length += (unsigned)(length < room ? length : room);
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) {
        if (c->head_length == HEAD_BYTES - 1) {
            fprintf(stderr, "sseload: a head of more than %d bytes\n", HEAD_BYTES);
            exit(1);
        }
        return length;
    }
    size_t used = (size_t)(end + 4 - c->head) - before;
    end[4] = 0;
    if (atoi(c->head + strlen("HTTP/1.1 ")) != 200 && !refused++) fprintf(stderr, "sseload: refused: %s", c->head);
    c->state = strcasestr(c->head, "\ntransfer-encoding: chunked") ? CHUNK_SIZE : PLAIN_BODY;
    free(c->head);
    c->head = NULL;
    if (!options.first_comment) become_open(c);
    return used;
}

static int hex_digit(char digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    digit |= 32;
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

static void take_bytes(struct client *c, const char *bytes, size_t length) {
    while (length && c->state != CLOSED) {
        size_t used = 1;
        switch (c->state) {
        case HEAD:
            used = take_head(c, bytes, length);
            break;
        case PLAIN_BODY:
            used = length;
            take_body(c, bytes, length);
            break;
        case CHUNK_SIZE:
            if (*bytes == '\n')
                c->state = c->chunk_left ? CHUNK_DATA : CHUNK_END;
            else if (hex_digit(*bytes) >= 0)
                c->chunk_left = c->chunk_left * 16 + (uint64_t)hex_digit(*bytes);
            break;
        case CHUNK_DATA:
            used = length < c->chunk_left ? length : (size_t)c->chunk_left;
            take_body(c, bytes, used);
            c->chunk_left -= used;
            if (!c->chunk_left) c->state = CHUNK_END;
            break;
        case CHUNK_END:
            if (*bytes == '\n') c->state = CHUNK_SIZE;
            break;
        case CONNECTING:
        case CLOSED:
            abort(); /* nobody reads then */
        }
        bytes += used;
        length -= used;
    }
}

/* ==== Connections ==== */

static void lose(struct client *c) {
    if (c->open && c - clients < options.stalled) {
        count.stalled_disconnected++;
    } else if (c->open) {
        count.disconnected++;
    } else {
        failed++;
        opening--;
    }
    c->state = CLOSED;
    close(c->fd);
}

static void connect_client(int number) {
    struct client *c = &clients[number];
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET};
    int on = 1, small = 2048;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) {
        perror("sseload: socket");
        exit(1);
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (number < options.stalled) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    /* Other source addresses than 127.0.0.1, as one has ports for only so many clients of one server. */
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    from.sin_addr.s_addr =
        htonl(0x7f000000u | (unsigned)options.address_base << 8 | (unsigned)(2 + number / CLIENTS_PER_ADDRESS));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons((uint16_t)options.port);
    c->state = CONNECTING;
    c->started = clock_ns();
    opening++;
    if (bind(c->fd, (void *)&from, sizeof from) ||
        (connect(c->fd, (void *)&to, sizeof to) && errno != EINPROGRESS)) {
        perror("sseload: connect");
        lose(c);
        return;
    }
    struct epoll_event connected = {.events = EPOLLOUT, .data.u32 = (uint32_t)number};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &connected);
}

static void send_request(struct client *c) {
    int number = (int)(c - clients), error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        fprintf(stderr, "sseload: client %d: %s\n", number, strerror(error));
        lose(c);
        return;
    }
    char path[256], resume[320] = "", request[1024];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(path, sizeof path, options.path, number % options.channels);
#pragma GCC diagnostic pop
    if (options.last_event_id) snprintf(resume, sizeof resume, "Last-Event-ID: %s\r\n", options.last_event_id);
    int length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n"
                          "Cache-Control: no-cache\r\n%s\r\n",
                          path, options.port, resume);
    if (write(c->fd, request, (size_t)length) != length) {
        lose(c);
        return;
    }
    c->state = HEAD;
    struct epoll_event readable = {.events = EPOLLIN, .data.u32 = (uint32_t)number};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &readable);
}

static void serve(struct client *c) {
    static char buffer[READ_BYTES];
    if (c->state == CLOSED) return;
    if (c->state == CONNECTING) {
        send_request(c);
        return;
    }
    ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        if (!c->open && !failed)
            fprintf(stderr, "sseload: a stream ended before it was open: %s, \"%.*s\"\n",
                    got ? strerror(errno) : "closed", (int)c->head_length, c->head ? c->head : "");
        lose(c);
        return;
    }
    now = clock_ns();
    count.reads++;
    count.bytes += (uint64_t)got;
    take_bytes(c, buffer, (size_t)got);
}

/* ==== Commands and reports ==== */

static bool waiting;
static uint64_t wanted_events, wait_end;

static void reset(void) {
    memset(&count, 0, sizeof count);
    memset(&delays, 0, sizeof delays);
    for (int number = 0; number < options.clients; number++) clients[number].events = 0;
    count.since = clock_ns();
}

static void say_ready(void) {
    printf("{\"ready\": %d, \"failed\": %d, \"refused\": %d, \"connect_s\": %.5f, \"connect_p50_ms\": %.3f, "
           "\"connect_p99_ms\": %.3f}\n",
           ready, failed, refused, last_ready ? (double)(last_ready - program_start) / 1e9 : 0.0,
           quantile(&openings, 0.5), quantile(&openings, 0.99));
    fflush(stdout);
}

static void say_report(void) {
    unsigned least = ~0u, most = 0; /* events of one client, among those that read */
    for (int number = options.stalled; number < options.clients; number++) {
        unsigned events = clients[number].events;
        if (events < least) least = events;
        if (events > most) most = events;
    }
    /* Without a reset, events that were published before this program started count, too. */
    uint64_t start = count.since ? count.since : program_start;
    double span = count.first_stamp ? (double)(count.last_arrival - count.first_stamp) / 1e9 : 0;
    printf("{\"events\": %llu, \"least\": %u, \"most\": %u, \"disconnected\": %d, \"stalled_disconnected\": %d, "
           "\"failed\": %d, \"refused\": %d, \"controls\": %llu, \"comments\": %llu, \"bytes\": %llu, \"reads\": %llu, \"unstamped\": %llu, "
           "\"span_s\": %.6f, \"elapsed_s\": %.6f, \"p50_ms\": %.4f, \"p90_ms\": %.4f, \"p99_ms\": %.4f, "
           "\"max_ms\": %.4f, \"mean_ms\": %.4f}\n",
           (unsigned long long)count.events, least == ~0u ? 0 : least, most, count.disconnected,
           count.stalled_disconnected, failed, refused,
           (unsigned long long)count.controls, (unsigned long long)count.comments, (unsigned long long)count.bytes,
           (unsigned long long)count.reads, (unsigned long long)count.unstamped, span,
           count.last_arrival ? (double)(count.last_arrival - start) / 1e9 : 0, quantile(&delays, 0.5),
           quantile(&delays, 0.9), quantile(&delays, 0.99), (double)delays.most / 1e6,
           delays.values ? delays.sum / (double)delays.values / 1e6 : 0);
    fflush(stdout);
}

static void obey(const char *command) {
    unsigned long long events;
    double seconds;
    if (!strcmp(command, "reset")) {
        reset();
        puts("{}");
        fflush(stdout);
    } else if (sscanf(command, "until %llu %lf", &events, &seconds) == 2) {
        waiting = true;
        wanted_events = events;
        wait_end = clock_ns() + (uint64_t)(seconds * 1e9);
    } else {
        fprintf(stderr, "sseload: what is \"%s\"?\n", command);
        exit(2);
    }
}

/* Return false at the end of standard input. */
static bool read_commands(void) {
    static char text[1024];
    static size_t length;
    ssize_t got = read(STDIN_FILENO, text + length, sizeof text - 1 - length);
    if (got <= 0) return false;
    length += (size_t)got;
    text[length] = 0;
    char *start = text, *end;
    for (; (end = strchr(start, '\n')); start = end + 1) {
        *end = 0;
        obey(start);
    }
    length -= (size_t)(start - text);
    memmove(text, start, length);
    return true;
}

static void read_options(int argc, char **argv) {
    enum { PORT = 1, CLIENTS, PATH, CHANNELS, INFLIGHT, STALLED, FIRST_COMMENT, LAST_EVENT_ID, ADDRESS_BASE };
    static const struct option known[] = {
        {"port", required_argument, NULL, PORT},
        {"clients", required_argument, NULL, CLIENTS},
        {"path", required_argument, NULL, PATH},                   /* %d becomes the channel's number */
        {"channels", required_argument, NULL, CHANNELS},           /* how many; clients take turns */
        {"inflight", required_argument, NULL, INFLIGHT},           /* that are being opened at once, at most */
        {"stalled", required_argument, NULL, STALLED},             /* the first so many stop reading */
        {"first-comment", no_argument, NULL, FIRST_COMMENT},       /* ready is a stream that has sent one */
        {"last-event-id", required_argument, NULL, LAST_EVENT_ID}, /* all resume from there */
        {"address-base", required_argument, NULL, ADDRESS_BASE},   /* clients come from 127.0.BASE.2 and on */
        {NULL, 0, NULL, 0},
    };
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) switch (option) {
        case PORT: options.port = atoi(optarg); break;
        case CLIENTS: options.clients = atoi(optarg); break;
        case PATH: options.path = optarg; break;
        case CHANNELS: options.channels = atoi(optarg); break;
        case INFLIGHT: options.inflight = atoi(optarg); break;
        case STALLED: options.stalled = atoi(optarg); break;
        case FIRST_COMMENT: options.first_comment = true; break;
        case LAST_EVENT_ID: options.last_event_id = optarg; break;
        case ADDRESS_BASE: options.address_base = atoi(optarg); break;
        default: exit(2);
        }
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    clients = calloc((size_t)options.clients, sizeof *clients);
    poller = epoll_create1(0);
    struct epoll_event happened[TURN_EVENTS];
    struct epoll_event command = {.events = EPOLLIN, .data.u32 = UINT32_MAX};
    epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &command);
    program_start = now = clock_ns();
    bool said_ready = false;
    for (;;) {
        while (opened < options.clients && opening < options.inflight) connect_client(opened++);
        int many = epoll_wait(poller, happened, TURN_EVENTS, 10);
        for (int place = 0; place < many; place++) {
            if (happened[place].data.u32 != UINT32_MAX)
                serve(&clients[happened[place].data.u32]);
            else if (!read_commands())
                goto end;
        }
        uint64_t time = clock_ns();
        if (!said_ready && (ready + failed >= options.clients ||
                            time - program_start > (uint64_t)(OPENING_SECONDS * 1e9))) {
            said_ready = true;
            say_ready();
        }
        if (waiting && (count.events >= wanted_events || time >= wait_end)) {
            waiting = false;
            say_report();
        }
    }
end:
    /* Reset, not closed in order: no port is left waiting, and the next round may have it. */
    for (int number = 0; number < opened; number++)
        if (clients[number].state != CLOSED) {
            struct linger at_once = {.l_onoff = 1, .l_linger = 0};
            setsockopt(clients[number].fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
            close(clients[number].fd);
        }
    return 0;
}
