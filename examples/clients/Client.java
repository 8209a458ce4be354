import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** Java's own client, as it is: it offers HTTP/2 with every request. */
class Client {
    public static void main(String[] args) throws Exception {
        String body = "{\"prompt\": \"a small red circle\", \"size\": \"256x256\", \"num_inference_steps\": 4}";
        HttpRequest request = HttpRequest.newBuilder(URI.create(args[0] + "/v1/images/generations"))
            .header("Content-Type", "application/json")
            .POST(HttpRequest.BodyPublishers.ofString(body))
            .build();
        HttpResponse<String> answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        if (answer.statusCode() != 200) {
            throw new RuntimeException(answer.statusCode() + " " + answer.body());
        }
        System.out.println(answer.version() + " " + answer.body().length() + " bytes");
    }
}
