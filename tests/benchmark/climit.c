/* The limit that hardware and kernel set: an event loop in C that does one send for each event and client,
   and nothing else. No access, no memory of events, no PostgreSQL; whoever falls behind is closed.

   cc -O2 -o climit climit.c
   climit HTTP_PORT FEED_PORT

   Every GET gets the stream. The publisher sends one event a line to FEED_PORT, over TCP. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 20, FRAME_BYTES = 1 << 16, TURN_EVENTS = 1024, MOST_CLIENTS = 1 << 20 };

static const char OPENING[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    "Cache-Control: no-store, no-transform\r\nX-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n"
    "10\r\n:\nretry: 2000\n\n\n\r\n";

static int poller;
static int streams[MOST_CLIENTS]; /* descriptors of the open streams */
static int stream_count;
static int place_of[MOST_CLIENTS]; /* by descriptor: one more than its place in streams; 0: none */

static int listen_on(const char *port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (void *)&at, sizeof at) || listen(fd, 4096)) {
        perror("climit: listen");
        exit(1);
    }
    return fd;
}

static void watch(int fd) {
    struct epoll_event readable = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &readable);
}

static void drop(int fd) {
    int place = place_of[fd];
    if (place) {
        streams[place - 1] = streams[--stream_count];
        place_of[streams[place - 1]] = place;
        place_of[fd] = 0;
    }
    close(fd);
}

static void send_event(const char *data, size_t length) {
    static char frame[FRAME_BYTES];
    static unsigned long long number;
    char id[64];
    int id_length = snprintf(id, sizeof id, "id: 0123456789abcdef-%llu\ndata: ", ++number);
    int head = snprintf(frame, sizeof frame, "%zx\r\n%s", (size_t)id_length + length + 2, id);
    memcpy(frame + head, data, length);
    memcpy(frame + head + length, "\n\n\r\n", 4);
    ssize_t size = (ssize_t)((size_t)head + length + 4);
    for (int place = stream_count - 1; place >= 0; place--)
        if (send(streams[place], frame, (size_t)size, MSG_NOSIGNAL) != size) {
            fprintf(stderr, "climit: closed a stream that was behind or gone\n");
            drop(streams[place]);
        }
}

/* Return 0 when the publisher has left. */
static int read_feed(int feed) {
    static char text[BUFFER_BYTES];
    static size_t length;
    ssize_t got = recv(feed, text + length, sizeof text - length, 0);
    if (got < 0) return 1;
    if (got == 0) return 0;
    length += (size_t)got;
    char *start = text, *end;
    for (; (end = memchr(start, '\n', length - (size_t)(start - text))); start = end + 1)
        if (end - start < FRAME_BYTES - 128) send_event(start, (size_t)(end - start));
    length -= (size_t)(start - text);
    memmove(text, start, length);
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "climit HTTP_PORT FEED_PORT\n");
        return 2;
    }
    poller = epoll_create1(0);
    int http = listen_on(argv[1]), feeds = listen_on(argv[2]), feed = -1, on = 1;
    watch(http);
    watch(feeds);
    for (;;) {
        struct epoll_event happened[TURN_EVENTS];
        int many = epoll_wait(poller, happened, TURN_EVENTS, -1);
        for (int place = 0; place < many; place++) {
            int fd = happened[place].data.fd;
            char request[4096];
            if (fd == http || fd == feeds) {
                int peer = accept4(fd, NULL, NULL, SOCK_NONBLOCK);
                if (peer < 0) continue;
                setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                if (fd == feeds) feed = peer;
                watch(peer);
            } else if (fd == feed) {
                if (!read_feed(feed)) {
                    close(feed);
                    feed = -1;
                }
            } else if (recv(fd, request, sizeof request, 0) <= 0) {
                drop(fd);
            } else if (!place_of[fd]) {
                streams[stream_count++] = fd;
                place_of[fd] = stream_count;
                send(fd, OPENING, sizeof OPENING - 1, MSG_NOSIGNAL);
            }
        }
    }
}
