// Reads runs of words: makes bursts of commands, ahead of their use, and keeps what comes in a queue.
//
// A command is `words` words, one at least, from byte `first` on. No more is asked for than the queue can hold, so `rready`
// is always up. A burst does not cross 4 KB. arsize (a whole word), arburst (INCR) and ids (0) do not change and are left
// to the wrapper.
module m3vit_axi_read #(
    parameter int ADDRESS_BITS = 40,
    parameter int DATA_BITS = 128,
    parameter int BURST = 16,
    parameter int DEPTH = 128
) (
    input  logic                    clk,
    input  logic                    reset,
    input  logic                    command_valid,
    output logic                    command_ready,
    input  logic [ADDRESS_BITS-1:0] command_first,
    input  logic [            15:0] command_words,
    output logic [   DATA_BITS-1:0] word,
    output logic                    word_valid,
    output logic [ $clog2(DEPTH):0] held,
    input  logic                    pop,
    output logic                    arvalid,
    input  logic                    arready,
    output logic [ADDRESS_BITS-1:0] araddr,
    output logic [             7:0] arlen,
    input  logic                    rvalid,
    output logic                    rready,
    input  logic [   DATA_BITS-1:0] rdata
);
    localparam int BYTES = DATA_BITS / 8;
    localparam int SHIFT = $clog2(BYTES);
    localparam int PAGE = 4096 / BYTES;  // words

    logic [15:0] sent, rest, most, size;  // words of the command: asked for, left, that a burst may have, that it has
    logic [ADDRESS_BITS-1:0] at;
    logic [$clog2(DEPTH):0] claimed;  // words asked for that were not taken out yet
    logic issue, empty;

    always_comb begin
        at = command_first + (ADDRESS_BITS'(sent) << SHIFT);
        rest = command_words - sent;
        most = 16'(PAGE) - 16'(at[11:SHIFT]);
        if (most > 16'(BURST)) most = 16'(BURST);
        size = rest < most ? rest : most;
        issue = command_valid && (!arvalid || arready) && 16'(claimed) + size <= 16'(DEPTH);
        command_ready = issue && size == rest;
    end
    always_ff @(posedge clk) begin
        if (reset) begin
            arvalid <= 0;
            sent <= 0;
            claimed <= 0;
        end else begin
            if (arready) arvalid <= 0;
            if (issue) begin
                arvalid <= 1;
                sent <= command_ready ? 0 : sent + size;
            end
            claimed <= claimed + (issue ? ($clog2(DEPTH) + 1)'(size) : 0) - ($clog2(DEPTH) + 1)'(pop);
        end
        if (issue) begin
            araddr <= at;
            arlen <= 8'(size - 1);
        end
    end

    assign rready = 1;
    assign word_valid = !empty;
    m3vit_fifo #(
        .WIDTH(DATA_BITS),
        .DEPTH(DEPTH)
    ) queue (
        .clk(clk),
        .reset(reset),
        .push(rvalid),
        .in(rdata),
        .pop(pop),
        .out(word),
        .empty(empty),
        .held(held)
    );
endmodule
