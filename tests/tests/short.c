/* Starts processes, eight at a time, each of which asks once and ends. */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static const char ASK[] = "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

static int ask(void) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(80)};
    char answer[4096];
    inet_pton(AF_INET, "169.254.169.254", &to.sin_addr);
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(s, (struct sockaddr *)&to, sizeof to) != 0) return 1;
    if (write(s, ASK, sizeof ASK - 1) != sizeof ASK - 1) return 2;
    return read(s, answer, sizeof answer) > 12 && memcmp(answer + 9, "200", 3) == 0 ? 0 : 3;
}

int main(int argc, char **argv) {
    if (argc < 2) return ask();
    int failed = 0, status;
    int left = atoi(argv[1]);
    for (int running = 0; left > 0 || running > 0;) {
        if (left > 0 && running < 8) {
            if (fork() == 0) { execl("/proc/self/exe", argv[0], (char *)0); _exit(9); }
            left--, running++;
            continue;
        }
        wait(&status);
        failed |= status, running--;
    }
    return failed != 0;
}
